import pytest
from readers import build_reader

from nanochat.data.corpus import open_corpus
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def reader_tokenizer():
    return Tokenizer.train(open_corpus("world:seed=0,known=40,new=40").documents("train"), 500)


@pytest.fixture(scope="session")
def reader(reader_tokenizer):
    return build_reader(reader_tokenizer)
