"""Surviving what machines do: starting local workers, and ending all of them when one dies."""
