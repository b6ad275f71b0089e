"""The text of a PDF, page by page, as JSON: run as a program of its own, with limits, for files of strangers.

    python pdf_text.py < file.pdf
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

MAX_PAGES = 1000
MAX_CHARACTERS = 10_000_000
MEMORY = 1 << 30  # bytes
CPU_SECONDS = 60
REFUSED = 3  # exit code: the message on stderr is for the user


class Refused(Exception):
    """Why a file is not read, for its owner."""


def limit() -> None:
    """No more than so much memory and time, where the system can be told; what it allows already may be less."""
    try:
        import resource
    except ImportError:  # Windows: the caller's time limit is all there is
        return
    wanted = {resource.RLIMIT_AS: MEMORY, resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_FSIZE: 0}
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(kind, (least, least))


def pages(data: bytes) -> list[str]:
    """Raises Refused."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise Refused("this PDF is encrypted; send it without a password")
    if len(reader.pages) > MAX_PAGES:
        raise Refused(f"this PDF has more than {MAX_PAGES} pages")
    texts, n = [], 0
    for page in reader.pages:
        texts.append(page.extract_text().encode("utf-8", "replace").decode())
        n += len(texts[-1])
        if n > MAX_CHARACTERS:
            raise Refused(f"this PDF holds more than {MAX_CHARACTERS:,} characters")
    return texts


def main() -> int:
    limit()
    try:
        json.dump(pages(sys.stdin.buffer.read()), sys.stdout)
    except Refused as error:
        print(error, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
