//! `greenroom status`: `GET /v1/status` for people.

use serde_json::Value;

use super::CliError;
use super::http::{Call, Server};
use super::out;

#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    server: Server,
    /// The answer as it came, for scripts
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), CliError> {
    let status = args.server.call("/v1/status", Call::Get)?;
    if args.json {
        out::print_json(&status)?;
    } else {
        out::print(&readable(&status))?;
    }
    Ok(())
}

fn readable(status: &Value) -> String {
    let host = &status["tiers"]["host"];
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let words = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut text = format!(
        "greenroom {}, boot {}\n",
        words(&status["version"]),
        words(&status["boot_id"])
    );
    let slots = ["total", "used", "pinned", "leased", "draining"]
        .map(|what| format!("{} {what}", number(&host[format!("slots_{what}")])));
    let arena = out::size(number(&host["arena_bytes"]));
    text.push_str(&format!("arena     {arena}; slots: {}\n", slots.join(", ")));
    let states = status["sessions"].as_object().into_iter().flatten();
    let states: Vec<String> = states
        .filter(|(_, count)| number(count) > 0)
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let states = if states.is_empty() {
        "none".to_owned()
    } else {
        states.join(", ")
    };
    text.push_str(&format!("sessions  {states}\n\n"));
    text.push_str(&engines(
        status["engines"].as_array().map_or(&[], Vec::as_slice),
    ));
    let counters = status["counters"].as_object().into_iter().flatten();
    let counters: Vec<Vec<String>> = counters
        .filter(|(_, count)| number(count) > 0)
        .map(|(name, count)| vec![name.clone(), count.to_string()])
        .collect();
    if !counters.is_empty() {
        text.push('\n');
        text.push_str(&out::table(&["COUNTER", "SINCE START"], &counters));
    }
    text
}

fn engines(engines: &[Value]) -> String {
    if engines.is_empty() {
        return "no engine is connected\n".to_owned();
    }
    let row = |engine: &Value| {
        let cell = |name: &str| engine[name].to_string();
        vec![
            engine["id"].as_str().unwrap_or("?").to_owned(),
            format!("{}/{}", cell("workers"), cell("ranks")),
            cell("gpu_blocks_total"),
            cell("gpu_blocks_free"),
            out::size(engine["slot_bytes"].as_u64().unwrap_or(0)),
            cell("block_tokens"),
        ]
    };
    let rows: Vec<Vec<String>> = engines.iter().map(row).collect();
    out::table(
        &[
            "ENGINE",
            "WORKERS",
            "GPU BLOCKS",
            "FREE",
            "SLOT",
            "TOKENS/BLOCK",
        ],
        &rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_status_reads_well() {
        let text = readable(&json!({
            "version": "0.1.0", "boot_id": "b7",
            "tiers": {"host": {"arena_bytes": 8_u64 << 30, "slots_total": 100, "slots_used": 30, "slots_pinned": 1, "slots_leased": 2, "slots_draining": 0}},
            "engines": [{"id": "e1", "workers": 2, "ranks": 2, "gpu_blocks_total": 500, "gpu_blocks_free": 20, "slot_bytes": 1 << 20, "block_tokens": 16}],
            "sessions": {"hold": 3, "host": 0},
            "counters": {"greenroom_fenced_copies_total": 0, "greenroom_match_blocks_total{result=\"hit\"}": 9},
        }));
        assert!(
            text.starts_with(
                "greenroom 0.1.0, boot b7\narena     8.0 GiB; slots: 100 total, 30 used, 1 pinned"
            ),
            "{text}"
        );
        assert!(text.contains("sessions  3 hold\n"), "{text}");
        assert!(text.contains("e1      2/2"), "{text}");
        assert!(
            text.contains("result=\"hit\"") && !text.contains("fenced"),
            "{text}"
        );
    }

    #[test]
    fn an_answer_with_nothing_in_it_is_shown_too() {
        let text = readable(&json!({}));
        assert!(
            text.contains("no engine is connected") && text.contains("sessions  none"),
            "{text}"
        );
    }
}
