"""The inference server: an OpenAI-compatible API, knowledge bases and the chat page. `server.chat_web` starts it."""
