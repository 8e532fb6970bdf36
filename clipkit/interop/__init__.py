"""Mappings between open_clip's layout and other libraries': pure functions on configurations and state dicts."""
