#!/usr/bin/env bash
# Tests the unit files with a real systemd: a user manager that is configured like the system manager, so that the units'
# account and hardening also take effect. tests/systemd_itself.rs runs this script as the first process of new namespaces, in a
# new control group: systemd.sh UNITS PROGRAMS (the directory of forkyard.service and .socket, and the directory of the examples
# `pages` and `crashy`). Prints a line for each verified behavior. Must not affect anything outside its namespaces and control
# group.
set -euo pipefail
units=$1 programs=$2

mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
# Unmount the machine's hierarchies, because a manager takes over all processes that it finds at their root.
umount --recursive --lazy /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/system /run/systemd/user/forkyard.service.d /run/programs /run/seen
# ProtectHome= and PrivateTmp= do not hide this path.
mount --bind "$programs" /run/programs
chmod 755 /run/seen
export XDG_RUNTIME_DIR=/run HOME=/run/home
log=/run/seen/log

# Change the command and the socket as described in docs/systemd.md, and write the log to a file that this script can read.
for unit in service socket; do
  sed -e "s|^ExecStart=.*|ExecStart=/run/programs/pages --bind http:systemd:http --workers 2 --cache 4M\nStandardError=append:$log|" \
    -e 's|^ListenStream=.*|ListenStream=/run/seen/app.sock|' -e 's|^FileDescriptorName=.*|FileDescriptorName=http|' \
    -e 's|^SocketGroup=.*|SocketGroup=root|' "$units/forkyard.$unit" > "/run/systemd/user/forkyard.$unit"
done
cp /run/systemd/user/forkyard.service /run/seen/plain.service

# The umask is 0, as in the system manager. Otherwise the service's account could not write to the notification socket.
(umask 0 && exec /lib/systemd/systemd --user) &
ended() {
  status=$?
  ((status == 0)) || { systemctl --user status forkyard.service forkyard.socket || true; tail -n 100 "$log"; } >&2
}
trap ended EXIT

fail() { echo "FAILED: $*" >&2; exit 1; }
# Waits up to a minute for a command to succeed.
await() {
  local end=$((SECONDS + 60))
  until "$@"; do
    ((SECONDS < end)) || fail "this did not happen: $*"
    sleep 0.05
  done
}
ask() { curl --silent --show-error --fail --max-time 60 --unix-socket /run/seen/app.sock "http://localhost$1"; }
property() { systemctl --user show --property "$1" --value forkyard.service; }
property_is() { [[ $(property "$1") == "$2" ]]; }
replaced() { local now; now=$(property MainPID) && [[ $now != 0 && $now != "$1" ]]; }
expect_property() { property_is "$1" "$2" || fail "$1 is $(property "$1"), not $2"; }
logged() { [[ $(grep -c "$1" "$log") == "$2" ]]; }
# Changes the unit for the following checks.
drop_in() {
  printf '[Service]\n%b\n' "$1" > /run/systemd/user/forkyard.service.d/test.conf
  systemctl --user daemon-reload
}

manager_answers() { systemctl --user show --property Version &> /run/seen/version; }
await manager_answers
version=$(sed 's/^Version=\([0-9]*\).*/\1/' /run/seen/version)

systemctl --user start forkyard.socket
expect_property ActiveState inactive
ask /who
await property_is ActiveState active
main=$(property MainPID)
echo "seen: the first connection starts the service, which answers"

[[ $(awk '/^Uid:/ { print $2 }' "/proc/$main/status") != 0 ]] || fail "the service runs as root"
grep -q '^CapBnd:[[:space:]]*0*$' "/proc/$main/status" || fail "CapabilityBoundingSet= is not in force"
grep -q '^Seccomp:.2' "/proc/$main/status" || fail "no filter of system calls is in force"
awk '$5 == "/" && $6 ~ /^ro/ { ro = 1 } END { exit !ro }' "/proc/$main/mountinfo" || fail "its file system can be written to"
echo "seen: it has an account of its own, and the hardening is in force"

systemctl --user stop forkyard.service
touch /run/seen/broken
drop_in 'ExecStart=\nExecStart=/run/programs/crashy --bind http:systemd:http --workers 2\nEnvironment=CRASHY_BROKEN=/run/seen/broken'
systemctl --user start forkyard.service &
starting=$!
await grep -q 'workers die before they are ready .* failures=2 ' "$log"
expect_property ActiveState activating
kill -0 "$starting" || fail "start has returned, and no worker is ready"
rm /run/seen/broken
wait "$starting"
expect_property ActiveState active
logged '^ready in' 2 || fail "start has returned too early"
systemctl --user stop forkyard.service
drop_in ''
echo "seen: start waits until all workers are ready"

systemctl --user start forkyard.service
main=$(property MainPID)
systemctl --user reload forkyard.service
await logged 'reload done gen=2' 1
[[ $(ask /who) == *"generation 2" ]] || fail "the workers are the old ones"
await property_is ActiveState active
expect_property MainPID "$main"
echo "seen: reload replaces the workers and not the master"

systemctl --user kill --kill-whom=main -s USR2 forkyard.service
await logged 'upgraded version=' 1
await logged 'reload done gen=3' 1
await property_is ActiveState active
expect_property MainPID "$main"
expect_property NRestarts 0
[[ $(ask /who) == *"generation 3" ]] || fail "the workers are the old ones"
echo "seen: an upgrade keeps the main pid, and the service active"

# Start three clients, each of which repeatedly opens a new connection. A client exits with an error on any failure.
page=$(ask /page/1)
clients=()
for client in 1 2 3; do
  while [[ ! -e /run/seen/enough ]]; do
    ask "/who" >> "/run/seen/answers-$client" || exit 1
  done &
  clients+=($!)
done
answered() { wc -l < "/run/seen/answers-$1" || echo 0; }
all_beyond() { for client in 1 2 3; do (($(answered "$client") > $1)) || return 1; done; }
await all_beyond 5
systemctl --user restart forkyard.service
most=$(cat /run/seen/answers-* | wc -l)
await all_beyond "$most"
touch /run/seen/enough
for client in "${clients[@]}"; do
  wait "$client" || fail "a request failed while the service was restarted"
done
replaced "$main" || fail "the master is the old one"
[[ $(ask /page/1) == "$page" ]] || fail "the page was rendered anew"
logged 'rendering page=1$' 1 || fail "the page was rendered again"
echo "seen: a restart fails no request, and the page cache survives it"

drop_in 'WatchdogSec=5s\nTimeoutAbortSec=1s'
systemctl --user restart forkyard.service
main=$(property MainPID)
kill -STOP "$main"
await replaced "$main"
await property_is ActiveState active
expect_property NRestarts 1
[[ ! -e /proc/$main ]] || fail "the old master is still there"
ask /who
drop_in ''
systemctl --user restart forkyard.service
echo "seen: a master that stands still is killed and replaced by the watchdog"

ask '/page/999?ms=5000' > /run/seen/slow &
asking=$!
await logged 'rendering page=999$' 1
systemctl --user stop --no-block forkyard.service
await property_is ActiveState deactivating
kill -0 "$asking" || fail "the slow request was over before the stop"
wait "$asking" || fail "the slow request was cut off"
grep -q 'Page 999' /run/seen/slow || fail "the slow request has no page"
await property_is ActiveState inactive
expect_property Result success
echo "seen: stop lets a request be finished"

# Apply the configuration from docs/systemd.md.
if ((version < 253)); then
  echo "NOT RUN: Type=notify-reload, which needs systemd 253; this is $version"
  exit
fi
sed -e 's/^Type=.*/Type=notify-reload/' -e '/^ExecReload=/d' /run/seen/plain.service > /run/systemd/user/forkyard.service
systemctl --user daemon-reload
systemctl --user start forkyard.service
systemctl --user reload forkyard.service
logged 'reload done gen=2' 2 || fail "reload has returned too early"
[[ $(ask /who) == *"generation 2" ]] || fail "the workers are the old ones"
echo "seen: with Type=notify-reload, reload waits until it is over"
