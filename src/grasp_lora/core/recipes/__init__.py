"""Recipes as data, and the choice among them within a budget."""
