"""Library code behind the instruments: replayed traces, coordinate checks, laziness, learning-rate transfer."""
