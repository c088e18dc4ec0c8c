"""When, whether, and under which check: the asset graph read from dvc.yaml, the registry, the command line. No torch is imported here."""
