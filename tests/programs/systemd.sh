#!/usr/bin/env bash
# The unit files under a real systemd: a user manager, in namespaces of its own, whose /run is empty. Called by
# tests/systemd_itself.rs within these namespaces: systemd.sh UNITS PROGRAM (a folder with forkyard.service and
# forkyard.socket, and the example `pages`). Says each thing that it has seen.
set -euo pipefail
units=$1 program=$2

mount -t proc proc /proc
mount -t tmpfs tmpfs /run
# Where the hierarchy's root is our own group now, systemd is to see it as such.
if [[ -d /sys/fs/cgroup/systemd ]]; then
  umount --lazy /sys/fs/cgroup/systemd
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
else
  umount --lazy /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mkdir -p /run/systemd/system /run/u /run/home/.config/systemd/user
chmod 700 /run/u
export XDG_RUNTIME_DIR=/run/u HOME=/run/home
log=/run/u/log

# What docs/systemd.md says is to be changed; and the account and the hardening go, which are for the system's manager alone.
for unit in service socket; do
  sed -e "s|^ExecStart=.*|ExecStart=$program --bind http:systemd:http --workers 2 --cache 4M|" \
    -e "s|^ListenStream=.*|ListenStream=/run/u/app.sock|" -e 's|^FileDescriptorName=.*|FileDescriptorName=http|' \
    -e 's|^WatchdogSec=.*|WatchdogSec=4s\nTimeoutAbortSec=1s\nStandardError=append:'"$log|" \
    -e '/^SocketGroup=/d' -e '/^DynamicUser=/,/^UMask=/d' -e '/^After=network/d' \
    "$units/forkyard.$unit" > "$HOME/.config/systemd/user/forkyard.$unit"
done

/lib/systemd/systemd --user --log-target=console --log-level=notice &
manager=$!
trap 'kill "$manager"; wait' EXIT
until systemctl --user is-system-running --quiet 2>/dev/null || [[ $(systemctl --user is-system-running 2>/dev/null) == degraded ]]; do
  kill -0 "$manager"
  sleep 0.1
done

ask() { curl --silent --fail --max-time 60 --unix-socket /run/u/app.sock "http://localhost$1"; }
main_pid() { systemctl --user show --property MainPID --value forkyard.service; }
is_active() { systemctl --user is-active --quiet forkyard.service; }
await() { until "$@"; do sleep 0.05; done; }
differs() { [[ $("${@:2}") != "$1" ]]; }
worker() { ask /who | cut -d' ' -f4; }

systemctl --user start forkyard.socket
! is_active
ask /who
is_active
echo "seen: the first connection starts the service, which answers"

first=$(main_pid)
page=$(ask /page/1)
systemctl --user stop forkyard.service
systemctl --user start forkyard.service
[[ $(grep -c '^ready in' "$log") == 2 ]]
echo "seen: start returns when all workers are ready"

page=$(ask /page/1)
main=$(main_pid) old=$(worker)
[[ $main != "$first" ]]
systemctl --user reload forkyard.service
await grep -q 'reload done gen=2' "$log"
await differs "$old" worker
[[ $(main_pid) == "$main" ]]
echo "seen: reload replaces the workers and not the master"

kill -USR2 "$main"
await grep -q 'upgraded version=' "$log"
await grep -q 'reload done gen=3' "$log"
[[ $(main_pid) == "$main" ]]
is_active
echo "seen: an upgrade keeps the main pid"

asked=0
while [[ ! -e /run/u/stop ]]; do ask "/page/$((asked % 50 + 100))?ms=1" > /dev/null && asked=$((asked + 1)) || exit 1; done &
asking=$!
systemctl --user restart forkyard.service
touch /run/u/stop
wait "$asking"
[[ $(main_pid) != "$main" ]]
[[ $(ask /page/1) == "$page" ]]
echo "seen: a restart fails no request, and the page cache survives it"

main=$(main_pid)
kill -STOP "$main"
await differs "$main" main_pid
await is_active
ask /who
echo "seen: a master that stands still is replaced by the watchdog"

ask '/page/999?ms=1000' > /run/u/slow &
asking=$!
await grep -q 'rendering page=999' "$log"
systemctl --user stop forkyard.service
wait "$asking"
grep -q 'Page 999' /run/u/slow
echo "seen: stop lets a request be finished"
