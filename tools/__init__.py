"""Run with python -m tools.NAME from the top of the repository; nothing here is imported."""
