"""Reports: figures of recorded runs, as a page, as text, as Markdown or as JSON."""
