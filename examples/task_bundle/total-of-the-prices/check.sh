#!/bin/bash
# Runs after all programs were stopped. The last line that it prints is the reward, because of reward = "number".
cd ~ && [ -f prices.txt ] || exit 1  # exit statuses from 1 to 125 are the reward 0
[ "$(tail -n 1 prices.txt)" = "total 12" ] || { echo 0; exit; }
[ "$(head -n 3 prices.txt)" = $'bread 3\nmilk 2\ntea 7' ] && echo 1 || echo 0.5
