"""Every form of data set to one table of pairs: delimited text, JSON lines, class folders, parquet, shards.

`reader` tells them apart; `columns` says what a row means in all of them.
"""
