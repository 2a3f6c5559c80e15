"""The command line: parse, call, render. The only place that prints.

Modules here import the heavy packages inside their commands, so that ``--help`` stays quick.
"""
