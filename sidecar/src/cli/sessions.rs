//! `greenroom sessions`: `GET /v1/sessions` for people.

use serde_json::Value;

use super::CliError;
use super::http::{Call, Server};
use super::out;

#[derive(Debug, clap::Args)]
pub(super) struct SessionsArgs {
    #[command(flatten)]
    server: Server,
    /// The answer as it came, for scripts
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &SessionsArgs) -> Result<(), CliError> {
    let answer = args.server.call("/v1/sessions", Call::Get)?;
    if args.json {
        out::print_json(&answer)?;
    } else {
        out::print(&readable(
            answer["sessions"].as_array().map_or(&[], Vec::as_slice),
        ))?;
    }
    Ok(())
}

fn readable(sessions: &[Value]) -> String {
    if sessions.is_empty() {
        return "no sessions\n".to_owned();
    }
    let rows: Vec<Vec<String>> = sessions.iter().map(row).collect();
    let head = [
        "SESSION", "STATE", "TOKENS", "GPU", "HOST", "PINNED", "TURNS", "TOOL", "BACK", "ENGINE",
    ];
    out::table(&head, &rows)
}

fn row(session: &Value) -> Vec<String> {
    let words = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let number = |value: &Value| {
        value
            .as_u64()
            .map_or_else(|| "-".to_owned(), |n| n.to_string())
    };
    vec![
        words(&session["id"]),
        words(&session["state"]),
        number(&session["tokens"]),
        number(&session["blocks"]["gpu"]),
        number(&session["blocks"]["host"]),
        number(&session["blocks"]["pinned"]),
        number(&session["turns"]),
        words(&session["tool"]),
        back(session["expected_return_ms"].as_i64()),
        words(&session["engine"]),
    ]
}

fn back(ms: Option<i64>) -> String {
    let seconds = |ms: u64| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
    match ms {
        None => "-".to_owned(),
        Some(ms) if ms < 0 => format!("{} late", seconds(ms.unsigned_abs())),
        Some(ms) => format!("in {}", seconds(ms.unsigned_abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sessions_stand_in_columns() {
        let text = readable(&[
            json!({"id": "agent-7", "state": "host", "tokens": 6000, "blocks": {"gpu": 0, "host": 375, "pinned": 0},
                "tool": "bash", "expected_return_ms": -1550, "engine": null, "turns": 2}),
            json!({"id": "b", "state": "active", "tokens": 1, "blocks": {"gpu": 1, "host": 1, "pinned": 1},
                "tool": null, "expected_return_ms": 250, "engine": "e", "turns": 1}),
        ]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("SESSION  STATE   TOKENS"), "{text}");
        assert!(lines[1].contains("bash  1.5 s late  -"), "{text}");
        assert!(lines[2].contains("in 0.2 s"), "{text}");
        assert_eq!(readable(&[]), "no sessions\n");
    }
}
