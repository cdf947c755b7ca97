// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The examples of `docs/pcow-img.md`, run as they stand there. Each block starts in an empty directory; a line with a `$`
//! is a command, the lines below it are what it prints. `...` stands for any text.

use crate::harness::Sandbox;

const DOCUMENT: &str = include_str!("../../../docs/pcow-img.md");

/// The blocks, with the line in which each begins.
fn blocks() -> Vec<(usize, Vec<&'static str>)> {
    let mut blocks = Vec::new();
    let mut open: Option<(usize, Vec<&str>)> = None;
    for (number, line) in DOCUMENT.lines().enumerate() {
        match (&mut open, line) {
            (None, "```console") => open = Some((number + 1, Vec::new())),
            (Some(_), "```") => blocks.extend(open.take()),
            (Some((_, lines)), line) => lines.push(line),
            (None, _) => {}
        }
    }
    blocks
}

fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split("...");
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else {
        return false;
    };
    let mut ends_here = true;
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
        ends_here = !part.is_empty();
    }
    rest.is_empty() || !ends_here
}

fn run_block(start: usize, lines: &[&str]) {
    let s = Sandbox::new();
    let mut commands = lines.iter().enumerate().peekable();
    while let Some((at, line)) = commands.next() {
        let command = line.strip_prefix("$ ").expect("a command before output");
        let mut expected = Vec::new();
        while let Some((_, line)) = commands.next_if(|(_, l)| !l.starts_with("$ ")) {
            expected.push(*line);
        }
        let finished = s.shell(command);
        let text = finished.stdout() + &finished.stderr();
        let found: Vec<_> = text.lines().map(str::trim_end).collect();
        let place = format!("line {} of docs/pcow-img.md: {expected:#?}", start + at + 1);
        let same = found.len() == expected.len()
            && expected.iter().zip(&found).all(|(e, f)| matches(e, f));
        finished.expect(same, &place);
    }
}

#[test]
fn every_example_of_the_document_prints_what_it_says() {
    let blocks = blocks();
    assert!(blocks.len() > 3, "only {} examples", blocks.len());
    for (start, lines) in blocks {
        run_block(start, &lines);
    }
}

#[test]
fn every_command_has_an_example() {
    let s = Sandbox::new();
    let help = s.ok(&["--help"]);
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    for line in commands.lines() {
        let name = line.split_whitespace().next().unwrap();
        let used = format!("$ pcow-img {name}");
        let blocks = blocks();
        let found = blocks
            .iter()
            .any(|(_, lines)| lines.iter().any(|l| l.contains(&used[2..])));
        assert!(found, "no example of {name}");
    }
}
