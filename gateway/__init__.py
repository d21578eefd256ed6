"""Conversations: OpenAI's REST API in, one ordered queue, a journal, hints to the store."""
