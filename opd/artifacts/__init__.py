"""What a run leaves behind: its folder, logs, provenance and report; and artefacts that later runs use again."""
