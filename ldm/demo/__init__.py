"""The web page: `pictures` takes uploads in, `studio` draws, `page` shows it (gradio), `sketch` is its canvas."""
