// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What failed in the long output of `cargo test`, to be said once more at its end.

/// Lines that are kept of one failure: its end, where a panic has its message.
const LINES: usize = 40;

/// Reads the output of `cargo test`, a line at a time, and keeps what it says of failures.
#[derive(Debug, Default)]
pub struct Failures {
    /// The line in which cargo named the program that runs now.
    program: String,
    /// What is being said, while it is of a failure.
    current: Option<Vec<String>>,
    found: Vec<String>,
}

impl Failures {
    /// Takes the next line of the output.
    pub fn line(&mut self, line: &[u8]) {
        let line = String::from_utf8_lossy(line).trim_end().to_string();
        let trimmed = line.trim_start();
        if trimmed.starts_with("Running ") || trimmed.starts_with("Doc-tests ") {
            self.end();
            self.program = trimmed.to_string();
        } else if line.starts_with("test result:") {
            self.end();
        } else if self.current.is_none() && (line == "failures:" || line.starts_with("error")) {
            self.current = Some(vec![self.program.clone(), line]);
        } else if let Some(current) = &mut self.current {
            current.push(line);
        }
    }

    /// Ends what is being said of a failure.
    fn end(&mut self) {
        let Some(mut lines) = self.current.take() else {
            return;
        };
        let more = lines.len().saturating_sub(LINES);
        if more > 0 {
            // The first line says where it is from.
            lines.splice(1..=more, [format!("({more} lines are left out)")]);
        }
        self.found.push(lines.join("\n"));
    }

    /// All that was said of failures, in order; empty if there were none.
    pub fn finish(mut self) -> String {
        self.end();
        self.found.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::{Failures, LINES};

    fn of(output: &str) -> String {
        let mut failures = Failures::default();
        output
            .lines()
            .for_each(|line| failures.line(line.as_bytes()));
        failures.finish()
    }

    #[test]
    fn of_all_output_the_failures_are_kept_with_their_program() {
        let output = "     Running tests/good.rs (good-1)\ntest a ... ok\ntest result: ok.\n     \
            Running tests/bad.rs (bad-1)\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\n\
            it broke\n\nfailures:\n    b\n\ntest result: FAILED.\n\
            error: 1 target failed:\n    `-p x --test bad`\n";
        let said = of(output);
        assert!(
            said.starts_with("Running tests/bad.rs (bad-1)\nfailures:"),
            "{said}"
        );
        assert!(said.contains("it broke"), "{said}");
        assert!(said.ends_with("    `-p x --test bad`"), "{said}");
        assert!(!said.contains("good"), "{said}");
    }

    #[test]
    fn nothing_is_kept_of_what_passed() {
        assert_eq!(
            of("     Running a\ntest a ... ok\ntest result: ok. 1 passed\n"),
            ""
        );
    }

    #[test]
    fn a_long_failure_keeps_its_end() {
        let lines: Vec<String> = (0..100).map(|n| format!("line {n}")).collect();
        let said = of(&format!("   Running x\nfailures:\n{}\n", lines.join("\n")));
        assert!(said.starts_with("Running x\n("), "{said}");
        assert!(said.ends_with("line 99"), "{said}");
        assert!(said.lines().count() <= LINES + 1, "{said}");
    }
}
