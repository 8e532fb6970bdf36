"""One file a command: its main() and the function that takes its settings. Commands never import each other."""
