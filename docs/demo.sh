#!/bin/sh
# The whole main job on one machine: a simulated EIGER sends Dectris Stream V2, another process correlates it live.
set -eu
mkdir -p demo
rm -f demo/result*.h5
address=zmq+dectris://127.0.0.1:31001

xpcs-stream qmap --shape 128x256 --beam-center-x 128 --beam-center-y 140 --detector-distance "5 m" \
    --pixel-size "75 um" --incident-energy "11 keV" --n-dynamic 6 --n-static 120 --out demo/qmap.h5

xpcs-stream simulate --qmap demo/qmap.h5 --to $address --frames 10000 --rate "500 Hz" --mean-counts 0.5 \
    --diffusion "4e5 angstrom^2/s" --lose 0.001 2>demo/simulate.log &
detector=$!
trap 'kill $detector 2>/dev/null || true' EXIT

xpcs-stream run --source $address --qmap demo/qmap.h5 --out demo/result.h5 --runs 1
xpcs-stream show demo/result.h5 --out demo/g2.png
echo "g2 per q, with the simulated truth over it: demo/g2.png"
