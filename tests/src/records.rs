// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a guest's writers and the test outside agree on.

/// Bytes of a record: a part of a page, so that none is torn by being on two.
pub const RECORD: usize = 256;

/// Bytes after which the pattern begins again: as much as there is on the disk that a writer reads from.
pub const PERIOD: u64 = 4 << 20;

/// Where in the pattern what stands at `offset` of a writer's file belongs.
pub fn place(offset: u64) -> u64 {
    offset % PERIOD
}

/// How many records `writer` has told of on `console` so far.
pub fn told(console: &str, writer: &str) -> u64 {
    // The last line may not be whole yet.
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let after = |line| str::strip_prefix(line, writer)?.strip_prefix(' ');
    let last = whole.lines().rev().find_map(after);
    last.map_or(0, |count| count.parse().unwrap())
}

#[cfg(test)]
mod tests {
    use super::told;

    #[test]
    fn only_a_whole_line_of_the_writer_tells() {
        let console = "a 1\nab 7\na 12\nb 3\na 1";
        assert_eq!(told(console, "a"), 12);
        assert_eq!(told(console, "c"), 0);
        assert_eq!(told("a 5", "a"), 0);
    }
}
