"""The engine: takes jobs (tokens and options), gives results (tokens and levels). Knows neither text nor transports."""
