"""Files and the Hub: fingerprints, strict JSON, cards."""
