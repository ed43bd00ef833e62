"""What is measured of a session before its tokens are trusted: a file per probe, and the driver that runs them all."""
