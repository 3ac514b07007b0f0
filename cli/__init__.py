"""The command line. Depends on the library, never the reverse; one module per family of commands."""
