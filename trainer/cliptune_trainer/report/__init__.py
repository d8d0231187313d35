"""What a finished job leaves for people and programs: `report/report.html` and `report/report.json`.

`write` puts it together: `figures` reads what the journals tell, `examples` asks the published model about a
few images, `page` and `charts` make one file of it that reaches for nothing else.
"""
