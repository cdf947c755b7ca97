# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A backend that is killed over and over under a guest with KVM.

# The processes of the backend that runs now, and of the last one that was started.
serving=/tmp/serving

# As pcow-backend, but another one takes the place of one that was killed. SIGTERM ends it, as it would end
# the backend, with the backend's status.
kept_backend() {
    ended=
    trap 'ended=1; kill -TERM "$(cat "$serving")"' TERM
    while :; do
        pcow-backend "$@" &
        echo $! >"$serving"
        status=0
        wait $! || status=$?
        # A signal ends the waiting, not the backend.
        if [ -n "$ended" ]; then
            status=0
            wait "$(cat "$serving")" || status=$?
            return "$status"
        fi
        [ "$status" = 137 ] || return "$status"
    done
}

# Kills the backend in every second round.
kill_backends() {
    for kill in $(seq "$kills"); do
        wait_for_guest "^round $((2 * kill))\."
        kill -KILL "$(cat "$serving")"
    done
}

# guest_outlives_its_backends KILLS
guest_outlives_its_backends() {
    kills=$1
    backend_program=kept_backend
    pcow-img create --allocation-unit 64K "$DAX/killed.pcow" 512M
    beside=kill_backends
    guest "$DAX/killed.pcow" rounds $((2 * kills + 2))
    grep -c 'a backend serves again' /tmp/guest.log | grep -q -x "$kills"
    # Storage that a backend had prepared ahead when it was killed is a leak, and nothing worse.
    pcow-img check --repair "$DAX/killed.pcow" || [ $? = 3 ]
    pcow-img check "$DAX/killed.pcow"
    rm -r "$DAX/killed.pcow"
}
