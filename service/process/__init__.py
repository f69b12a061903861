"""The server as a process: its addresses, cores, signals, event loop and log."""
