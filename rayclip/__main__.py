from rayclip.cli import main

main()
