"""`deskrl sweep`: the same run under several arms and seeds, and which arm did better at equal environment steps.

`plan` turns a file into cells, `drive` runs those that are not complete, `curves` and `verdict` do the arithmetic,
`page` shows it. Every cell is an ordinary run, made by the ordinary `deskrl up`.
"""
