"""The attack: fuzzed training, killed runs, damaged checkpoints and full disks, each judged by plain torch or by bits.

python tests/soak --minutes 30 --seed 0          # everything, and the counts in bench/results/reliability.json
python tests/soak fuzz --minutes 5               # one harness: fuzz, kill, damage, disk
python tests/soak fuzz --case 1234               # one case again, as a finding's line says
python tests/soak --render                       # docs/reliability.md from the counts
"""
