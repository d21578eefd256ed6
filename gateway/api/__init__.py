"""The REST surface: requests in, OpenAI's shapes out. Decides nothing about turns."""
