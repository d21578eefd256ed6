"""The web page at `/`: a chat, and beside it where its tokens came from."""
