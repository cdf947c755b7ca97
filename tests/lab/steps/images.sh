# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What an image is for: boots, clones, snapshots, and that it takes no more than was written.

BASE=$DAX/base.pcow

# Makes the base that clones have, unless an earlier step did. Its guest wrote the file "one".
need_base() {
    if [ ! -d "$BASE" ]; then
        pcow-img create --allocation-unit 64K "$BASE" 128M
        guest "$BASE" write one
    fi
}

# grown IMAGE BEFORE: says by how much an image has grown from BEFORE KiB to now, beside what its guest
# has written.
grown() {
    growth=$(($(taken "$1") - $2))
    written=$(told written)
    echo "$1 has grown by $growth KiB; its guest has written $written KiB into files"
}

# The same limit as under emulation (tests/tests/guest/thin.rs): a quarter more than was written, and
# 8 MiB, which have to do for the filesystem's own data, too.
assert_grown_little() {
    grown "$@"
    [ "$growth" -ge "$written" ] || fail "less than was written"
    [ "$growth" -le $((written + written / 4 + 8192)) ] || fail "more than the allowance"
}

# Keeps what the kernel tells of QEMU's mappings when the guest has written everything, and lets the guest go on.
keep_mappings() {
    wait_for_guest '^sums: '
    cat "/proc/$(pidof qemu-system-x86_64)/smaps" >/tmp/smaps
    echo go
}

# QEMU had mapped an image's data for stores, and synchronously (MAP_SYNC) wherever it had.
assert_synchronous() {
    awk '/^[0-9a-f]+-[0-9a-f]+ / { counts = $2 ~ /^.w/ && $6 ~ /[.]data$/ }
        counts && /^VmFlags:/ { all++; if (/ sf( |$)/) synchronous++ }
        END { print all + 0, synchronous + 0 }' /tmp/smaps >/tmp/counts
    read -r all synchronous </tmp/counts
    echo "QEMU has mapped data for stores at $all places, $synchronous of them synchronously"
    [ "$all" -gt 0 ] || fail "no data is mapped for stores"
    [ "$synchronous" = "$all" ] || fail "a mapping is not synchronous"
}

guest_boots_twice() {
    rm -rf "$BASE"
    pcow-img create --allocation-unit 64K "$BASE" 128M
    empty=$(taken "$BASE")
    beside=keep_mappings
    guest "$BASE" write one wait
    beside=
    assert_synchronous
    assert_grown_little "$BASE" "$empty"
    sums=$(told sums)
    guest "$BASE" verify one
    [ "$(told sums)" = "$sums" ]
    pcow-img check "$BASE"
    pcow-img info "$BASE"
}

# With 2 MiB as the unit of allocation, what a filesystem spreads over the disk takes more; how much is
# only shown.
guest_writes_with_the_default_unit() {
    pcow-img create "$DAX/default.pcow" 128M
    empty=$(taken "$DAX/default.pcow")
    guest "$DAX/default.pcow" write one
    grown "$DAX/default.pcow" "$empty"
    pcow-img check "$DAX/default.pcow"
    rm -r "$DAX/default.pcow"
}

# clone NAME WORD [OPTION]...: a clone of the base whose guest changes a part of the base's file.
clone() {
    name=$1
    word=$2
    shift 2
    pcow-img create --base "$BASE" "$@" "$DAX/$name.pcow"
    guest "$DAX/$name.pcow" change "$word"
    pcow-img check "$DAX/$name.pcow"
}

# Seals what the base shows, for clones, and notes the sums of all files that hold it.
seal_base() {
    pcow-img create --base "$BASE" "$DAX/sealer.pcow"
    rm -r "$DAX/sealer.pcow"
    md5sum "$BASE"/*.data "$BASE"/*.map >/tmp/sums
}

guest_changes_a_clone() {
    need_base
    seal_base
    clone first two --allocation-unit 64K
    md5sum -c /tmp/sums
    rm -r "$DAX/first.pcow"
}

guests_change_clones() {
    need_base
    seal_base
    clone first two
    first=$(told sums)
    clone second three --allocation-unit 64K
    second=$(told sums)
    pcow-img create --base "$DAX/first.pcow" "$DAX/grandchild.pcow"
    guest "$DAX/grandchild.pcow" change four
    guest "$DAX/first.pcow" verify one two
    [ "$(told sums)" = "$first" ]
    guest "$DAX/second.pcow" verify one three
    [ "$(told sums)" = "$second" ]
    md5sum -c /tmp/sums
    guest "$BASE" verify one
    rm -r "$DAX/first.pcow" "$DAX/second.pcow" "$DAX/grandchild.pcow"
}

# roll_back IMAGE SNAPSHOT: prints the name under which the present state was kept.
roll_back() {
    pcow-img rollback "$1" "$2" >&2
    pcow-img list "$1" >&2
    pcow-img list "$1" | grep -o 'before-rollback-[^ ]*' | tail -n 1
}

guest_sees_a_rollback() {
    need_base
    image=$DAX/history.pcow
    pcow-img create --base "$BASE" --allocation-unit 64K "$image"
    guest "$image" verify one
    old=$(told sums)
    pcow-img snapshot "$image" kept
    guest "$image" change two
    new=$(told sums)
    [ "$new" != "$old" ]

    saved=$(roll_back "$image" kept)
    guest "$image" verify one
    [ "$(told sums)" = "$old" ]
    roll_back "$image" "$saved"
    guest "$image" verify one two
    [ "$(told sums)" = "$new" ]
    pcow-img check "$image"
    rm -r "$image"
}

# Clusters of a small disk whose loads may be taken for stores beside one in a hundred: when the host is busy, some of
# KVM's workers run too late, a handful in any guest, of however many clusters.
LATE_WORKERS=16

# assert_shared IMAGE BEFORE LOG MIB: loads of all of the disk of MIB have allocated under one in a hundred of its
# clusters: by the session's counters before anything was given back, and on disk when the guest has ended.
assert_shared() {
    growth=$(($(taken "$1") - $2))
    copied=$(($(logged "taken for stores" "$3") + $(logged "copied on touch" "$3")))
    clusters=$(($4 * 16))
    late=$LATE_WORKERS
    if [ "$4" -ge 512 ]; then late=0; fi
    echo "$1 has grown by $growth KiB, of $4 MiB that were loaded; $copied clusters of $clusters were copied for a while"
    [ $((growth * 100)) -lt $(($4 * 1024)) ] || fail "loads have allocated"
    [ $((copied * 100)) -lt $((clusters + late * 100)) ] || fail "loads were taken for stores"
    grep "loads and stores told apart: bounce;" "$3"
}

EMPTY=$DAX/empty.pcow
FULL=$DAX/full.pcow

# read_disks MIB: a guest loads all of an empty disk and of one with a full base, of MIB each.
read_disks() {
    mib=$1
    dd if=/dev/urandom of="$DAX/full.raw" bs=1M count="$mib" 2>/dev/null
    pcow-img create --allocation-unit 64K "$EMPTY" "${mib}M"
    pcow-img create --allocation-unit 64K --base "$DAX/full.raw" --base-format raw "$FULL"
    empty_before=$(taken "$EMPTY")
    full_before=$(taken "$FULL")
    guest "$EMPTY $FULL" read
    told sum | sort >/tmp/told
    for disk in "$DAX/full.raw" /dev/zero; do
        dd if="$disk" bs=1M count="$mib" 2>/dev/null | md5sum
    done | sort >/tmp/expected
    cmp /tmp/told /tmp/expected
}

# assert_disks ASSERTION: of each of the disks that were read.
assert_disks() {
    "$1" "$EMPTY" "$empty_before" /tmp/backend0.log "$mib"
    "$1" "$FULL" "$full_before" /tmp/backend1.log "$mib"
    rm -r "$EMPTY" "$FULL" "$DAX/full.raw"
}

# guest_reads_without_allocating MIB: a kernel worker asks for write access in place of a vCPU that loads; BOUNCE of
# protocol.md tells it from a store.
guest_reads_without_allocating() {
    read_disks "$1"
    assert_disks assert_shared
}

# assert_given_back IMAGE BEFORE LOG MIB: loads of all of the disk have copied or allocated nearly all of it, and nearly
# all of that was given back.
assert_given_back() {
    growth=$(($(taken "$1") - $2))
    copied=$(logged "copied on touch" "$3")
    echo "$1 has grown by $growth KiB, of $4 MiB that were loaded; $copied touches have copied"
    [ "$(logged bounced "$3")" = 0 ] || fail "there were bounces"
    [ "$copied" -gt $(($4 * 16 / 2)) ] || fail "loads have not copied"
    [ $((growth * 100)) -lt $(($4 * 1024)) ] || fail "what was only read was not given back"
    grep "loads and stores told apart: copy-on-touch;" "$3"
}

# guest_reads_without_bounces MIB
guest_reads_without_bounces() {
    memory_options=,bounce=off
    read_disks "$1"
    memory_options=
    assert_disks assert_given_back
}

# assert_exact IMAGE BEFORE LOG MIB: every load was known as one, so that there was nothing to be given back.
assert_exact() {
    growth=$(($(taken "$1") - $2))
    echo "$1 has grown by $growth KiB, of $4 MiB that were loaded"
    [ "$(logged "of unknown direction" "$3")" = 0 ] || fail "the direction of a touch was not known"
    [ "$(logged reads "$3")" -ge $(($4 * 16)) ] || fail "there were fewer loads than clusters"
    [ "$(logged "given back" "$3")" = 0 ] || fail "a load has allocated"
    grep "loads and stores told apart: exact;" "$3"
    [ $((growth * 100)) -lt $(($4 * 1024)) ] || fail "loads have allocated"
}

# guest_reads_exactly MIB: with the arguments of README.md with which a vCPU waits for a page itself.
guest_reads_exactly() {
    machine="-overcommit cpu-pm=on -cpu host,kvm-asyncpf=off,kvm-asyncpf-int=off"
    read_disks "$1"
    machine=
    assert_disks assert_exact
}
