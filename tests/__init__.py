"""Tests: one folder a room of the package, `properties/` for equalities a user would state, `house/` for the house rules."""
