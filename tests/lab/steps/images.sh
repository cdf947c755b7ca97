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

guest_boots_twice() {
    rm -rf "$BASE"
    pcow-img create --allocation-unit 64K "$BASE" 128M
    empty=$(taken "$BASE")
    guest "$BASE" write one
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
}

# guest_reads_without_allocating MIB: an empty disk and one with a full base, of MIB each. A kernel worker
# asks for write access in place of a vCPU that loads; BOUNCE of protocol.md tells it from a store.
guest_reads_without_allocating() {
    mib=$1
    empty=$DAX/empty.pcow
    clone=$DAX/full.pcow
    dd if=/dev/urandom of="$DAX/full.raw" bs=1M count="$mib" 2>/dev/null
    pcow-img create --allocation-unit 64K "$empty" "${mib}M"
    pcow-img create --allocation-unit 64K --base "$DAX/full.raw" --base-format raw "$clone"
    empty_before=$(taken "$empty")
    clone_before=$(taken "$clone")
    guest "$empty $clone" read
    told sum | sort >/tmp/told
    for disk in "$DAX/full.raw" /dev/zero; do
        dd if="$disk" bs=1M count="$mib" 2>/dev/null | md5sum
    done | sort >/tmp/expected
    cmp /tmp/told /tmp/expected
    assert_shared "$empty" "$empty_before" /tmp/backend0.log "$mib"
    assert_shared "$clone" "$clone_before" /tmp/backend1.log "$mib"
    rm -r "$empty" "$clone" "$DAX/full.raw"
}
