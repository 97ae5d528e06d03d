"""Pictures of what the library plans, from integers alone: what is drawn (`scene`), and the writers of it as SVG, a
page of HTML, text and PNG. Nothing here knows torch."""
