"""The command line: one module for each group of commands. app.py parses, output.py prints."""
