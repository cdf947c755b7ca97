// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Percentiles and medians of what was measured.

use std::time::Duration;

/// The value below which `percent` of the sorted `samples` lie; `None` without samples.
fn percentile(samples: &mut [f64], percent: usize) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    let last = samples.len().checked_sub(1)?;
    samples.get(last * percent / 100).copied()
}

/// The middle of `samples`; 0 without samples.
pub fn median(mut samples: Vec<f64>) -> f64 {
    percentile(&mut samples, 50).unwrap_or(0.0)
}

/// Smallest and largest of `samples`.
fn spread(samples: &[f64]) -> (f64, f64) {
    let low = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let high = samples.iter().copied().fold(0.0, f64::max);
    (low, high)
}

/// Median and spread of `samples`, with so many decimals.
pub fn text(samples: Vec<f64>, decimals: usize) -> String {
    let (low, high) = spread(&samples);
    let middle = median(samples);
    format!("{middle:.decimals$} ({low:.decimals$} to {high:.decimals$})")
}

/// Median and 99th percentile of some latencies, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

impl Latency {
    /// Of what was measured in one round.
    pub fn of(samples: &[Duration]) -> Self {
        let mut us: Vec<f64> = samples.iter().map(|d| d.as_secs_f64() * 1e6).collect();
        Self {
            p50_us: percentile(&mut us, 50).unwrap_or(0.0),
            p99_us: percentile(&mut us, 99).unwrap_or(0.0),
        }
    }

    /// The medians over rounds.
    pub fn median(rounds: &[Self]) -> Self {
        Self {
            p50_us: median(rounds.iter().map(|l| l.p50_us).collect()),
            p99_us: median(rounds.iter().map(|l| l.p99_us).collect()),
        }
    }
}
