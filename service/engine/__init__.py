"""The engine: takes jobs (tokens and options), gives results (tokens and levels). Knows no text, no transport."""
