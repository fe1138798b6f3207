"""A Hub on loopback for the tests, and the clients that load from it and push to it, each a process of its own."""
