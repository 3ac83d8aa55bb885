#!/usr/bin/env bash
# Train the student of the embedded model without annotations: scripts/train_student.sh PHOTOS FOLDER
#
# About two hours of one core. Every step can be interrupted, and the same command continues. First scenes are drawn, and the
# decoder learns from these alone. Then it learns from photos, too, whose labels are the geometric mean of what it finds
# and of what the search finds; at the end, attention joins.
set -eu
photos=$1 folder=$2
mkdir -p "$folder"

trace-fast scenes "$photos" -o "$folder/scenes" --count 12000 --size 256

train() { # NAME OPTION...
  trace-fast distill --images "$photos" -o "$folder/$1" --size 128x128 --teacher-timestep 0 --decoder unet \
    --scenes "$folder/scenes" --window 128 --loss cross-entropy --rate 0 --reconstruction 0 --jitter 0.3 \
    --channel-shuffle 0.5 --batch 16 --dtype bfloat16 "${@:2}"
}
train from-scenes --scenes-share 1 --blank-attention 1 --labels soft --edge-weight 10 --decoder-rate 2e-3 --epochs 15

train_on_photos() { # NAME INITIAL OPTION...
  train "$1" --scenes-share 0.5 --labels combined --labels-student "$folder/from-scenes/student" \
    --labels-dir "$folder/labels" --init-from "$folder/$2/student" --teacher-size 192x192 --limit 1506 --edge-weight 2 \
    --decoder-rate 1e-3 "${@:3}"
}
train_on_photos without-attention from-scenes --blank-attention 1 --epochs 8
train_on_photos with-attention without-attention --blank-attention 0.7 --epochs 2
echo "$folder/with-attention/student"
