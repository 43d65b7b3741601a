"""Tests for the parts people write themselves: inherit a contract class and pytest runs it over your kind."""
