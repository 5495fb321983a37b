//! How long tools take: an empirical distribution per tool name, asked for the time that remains.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// Durations remembered per tool.
const PER_TOOL: usize = 256;
/// Tools remembered; the names come from clients, so there is a limit.
const TOOLS_MAX: usize = 512;
/// With fewer longer observations than this the empirical tail says nothing.
const SURVIVORS_MIN: usize = 8;
/// What is assumed of a tool of which nothing is known at all.
const UNKNOWN: Duration = Duration::from_secs(1);

/// Tools whose answer comes from a person.
const HUMAN: [&str; 8] = [
    "askuserquestion",
    "ask_user",
    "ask_human",
    "human",
    "user_input",
    "approval",
    "request_approval",
    "exitplanmode",
];

/// Whether a tool waits for a person: nothing is brought back for those.
pub fn is_human(tool: &str) -> bool {
    let tool = tool.to_ascii_lowercase();
    HUMAN.contains(&tool.as_str())
}

/// Observed durations of tool calls.
#[derive(Debug, Default)]
pub struct Durations {
    tools: HashMap<String, VecDeque<Duration>>,
    all: VecDeque<Duration>,
}

impl Durations {
    /// Learns one finished call.
    pub fn observe(&mut self, tool: &str, took: Duration) {
        remember(&mut self.all, took);
        if let Some(ring) = self.tools.get_mut(tool) {
            remember(ring, took);
        } else if self.tools.len() < TOOLS_MAX {
            self.tools.insert(tool.to_owned(), VecDeque::from([took]));
        }
    }

    /// Median of the time that remains of a call that has run for `elapsed`.
    ///
    /// The median of `{d − e : d > e}` over the tool's observations, else over all tools'. With fewer than eight
    /// longer observations the tail is taken as Pareto with α = 2, whose median remaining time is `e·(√2 − 1)`
    /// (with the elapsed time as the scale; InferCept's estimator is the mean of the same tail).
    pub fn remaining(&self, tool: &str, elapsed: Duration) -> Duration {
        let of_tool = self
            .tools
            .get(tool)
            .and_then(|ring| median_excess(ring, elapsed));
        of_tool
            .or_else(|| median_excess(&self.all, elapsed))
            .unwrap_or_else(|| elapsed.max(UNKNOWN).mul_f64(std::f64::consts::SQRT_2 - 1.0))
    }
}

fn remember(ring: &mut VecDeque<Duration>, took: Duration) {
    if ring.len() == PER_TOOL {
        ring.pop_front();
    }
    ring.push_back(took);
}

fn median_excess(ring: &VecDeque<Duration>, elapsed: Duration) -> Option<Duration> {
    let mut excess: Vec<Duration> = ring
        .iter()
        .filter(|d| **d > elapsed)
        .map(|d| *d - elapsed)
        .collect();
    if excess.len() < SURVIVORS_MIN {
        return None;
    }
    let middle = excess.len() / 2;
    let (_, median, _) = excess.select_nth_unstable(middle);
    Some(*median)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_known_tool_is_asked_before_all_tools() {
        let mut durations = Durations::default();
        for i in 0..32 {
            durations.observe("read", ms(10 + i));
            durations.observe("build", ms(60_000 + i));
        }
        assert!(durations.remaining("read", ms(0)) < ms(60));
        assert!(durations.remaining("build", ms(0)) >= ms(60_000));
        // Past everything that was seen of `read`, the other tools' longer calls speak.
        assert!(durations.remaining("read", ms(100)) > ms(1_000));
    }

    #[test]
    fn the_median_is_conditional_on_the_time_elapsed() {
        let mut durations = Durations::default();
        for i in 1..=100 {
            durations.observe("bash", ms(i * 100));
        }
        let early = durations.remaining("bash", ms(0));
        let late = durations.remaining("bash", ms(8_000));
        assert!(early >= ms(4_900) && early <= ms(5_200), "{early:?}");
        assert!(late >= ms(900) && late <= ms(1_200), "{late:?}");
    }

    #[test]
    fn the_tail_grows_with_the_wait() {
        let durations = Durations::default();
        assert!(durations.remaining("x", ms(0)) > ms(0));
        assert_eq!(durations.remaining("x", ms(100_000)).as_millis(), 41_421);
    }

    #[test]
    fn names_from_clients_are_bounded() {
        let mut durations = Durations::default();
        for i in 0..2 * TOOLS_MAX {
            durations.observe(&format!("tool-{i}"), ms(1));
        }
        assert_eq!(durations.tools.len(), TOOLS_MAX);
        assert_eq!(durations.all.len(), PER_TOOL);
    }

    #[test]
    fn people_are_told_from_tools() {
        assert!(is_human("AskUserQuestion"));
        assert!(!is_human("bash"));
    }
}
