//! `greenroom hint`: one tool event or one action, sent by hand.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::CliError;
use super::http::{Call, Server, segment};
use super::out;
use crate::config::Span;

#[derive(Debug, clap::Args)]
pub(super) struct HintArgs {
    #[command(flatten)]
    server: Server,
    /// The answer as it came, for scripts
    #[arg(long)]
    json: bool,
    /// The session it is about
    session: String,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// A tool call began
    ToolStart {
        /// Name of the tool
        tool: String,
        /// Names one of several parallel calls
        #[arg(long, value_name = "ID")]
        call_id: Option<String>,
        /// Free text, e.g. the command line
        #[arg(long, value_name = "TEXT")]
        detail: Option<String>,
        /// Time until it returns, as far as known
        #[arg(long, value_name = "DURATION")]
        eta: Option<Span>,
    },
    /// News of a running tool call
    ToolProgress {
        /// Which call; the only one if left out
        #[arg(long, value_name = "ID")]
        call_id: Option<String>,
        /// Share of the work done, 0 to 1
        #[arg(long)]
        fraction: Option<f64>,
        /// Time until it returns
        #[arg(long, value_name = "DURATION")]
        eta: Option<Span>,
    },
    /// A tool call ended
    ToolEnd {
        /// Which call; the only one if left out
        #[arg(long, value_name = "ID")]
        call_id: Option<String>,
        /// The tool failed
        #[arg(long)]
        failed: bool,
    },
    /// Bring the KV back to the GPU now
    Prefetch {
        /// Time until the KV is needed
        #[arg(long, value_name = "DURATION")]
        eta: Option<Span>,
        /// Order among prefetches that compete for room, higher first
        #[arg(long, allow_negative_numbers = true)]
        priority: Option<f64>,
    },
    /// Do not evict from the host
    Pin {
        /// For how long
        #[arg(long, value_name = "DURATION")]
        ttl: Option<Span>,
    },
    /// Take pins back
    Unpin,
    /// It will be used again
    Retain,
    /// Evict it first
    Demote,
}

/// A call ready to be made.
struct Prepared {
    path: String,
    body: Value,
}

pub(super) fn run(args: &HintArgs) -> Result<(), CliError> {
    let prepared = prepare(&args.session, &args.what, &message_id());
    let answer = args
        .server
        .call(&prepared.path, Call::Post(&prepared.body))?;
    if args.json {
        out::print_json(&answer)?;
    }
    let result = &answer["results"][0];
    let Some(outcome) = result["outcome"].as_str() else {
        if !args.json {
            out::print("ok\n")?;
        }
        return Ok(());
    };
    let mut line = outcome.to_owned();
    if let Some(blocks) = result["blocks"].as_u64() {
        line.push_str(&format!(", {blocks} blocks"));
    }
    if let Some(detail) = result["detail"].as_str() {
        line.push_str(&format!(": {detail}"));
    }
    if matches!(outcome, "rejected" | "missing") {
        return Err(CliError::BadNews(line));
    }
    if !args.json {
        out::print(&format!("{line}\n"))?;
    }
    Ok(())
}

/// Different for every run: a repeated id would get the answer of the first one.
fn message_id() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    format!(
        "cli-{}-{}",
        std::process::id(),
        since.unwrap_or_default().as_nanos()
    )
}

fn prepare(session: &str, what: &What, message_id: &str) -> Prepared {
    let tool_event = |event: &str, body: Value| Prepared {
        path: format!("/v1/sessions/{}/{event}", segment(session)),
        body: without_nulls(body),
    };
    let action = |kind: &str, extra: Value| Prepared {
        path: "/v1/hints".to_owned(),
        body: envelope(session, kind, (message_id, extra)),
    };
    match what {
        What::ToolStart {
            tool,
            call_id,
            detail,
            eta,
        } => tool_event(
            "tool_start",
            json!({"tool": tool, "call_id": call_id, "detail": detail, "eta_ms": ms(eta.as_ref())}),
        ),
        What::ToolProgress {
            call_id,
            fraction,
            eta,
        } => tool_event(
            "tool_progress",
            json!({"call_id": call_id, "fraction": fraction, "eta_ms": ms(eta.as_ref())}),
        ),
        What::ToolEnd { call_id, failed } => {
            tool_event("tool_end", json!({"call_id": call_id, "ok": !failed}))
        }
        What::Prefetch { eta, priority } => action(
            "kv.prefetch",
            json!({"eta_ms": ms(eta.as_ref()), "priority": priority}),
        ),
        What::Pin { ttl } => action("kv.pin", json!({"ttl_ms": ms(ttl.as_ref())})),
        What::Unpin => action("kv.unpin", json!({})),
        What::Retain => action("kv.retain", json!({})),
        What::Demote => action("kv.demote", json!({})),
    }
}

fn envelope(session: &str, kind: &str, (message_id, extra): (&str, Value)) -> Value {
    let mut payload = without_nulls(extra);
    payload["target"] = json!({"session_id": session});
    json!({
        "protocol_version": "1.0",
        "message_id": message_id,
        "actions": [{"action_id": "1", "action_type": kind, "action_version": "1.0", "payload": payload}],
    })
}

fn ms(span: Option<&Span>) -> Option<f64> {
    span.map(|span: &Span| as_ms(span.0))
}

fn as_ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let given = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(given.collect::<Map<_, _>>())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::parse;
    use crate::commands::{HintVerb, Target};

    fn prepared(what: What) -> (String, Vec<u8>) {
        let call = prepare("a/b", &what, "m");
        (call.path, serde_json::to_vec(&call.body).unwrap())
    }

    #[test]
    fn what_it_sends_is_what_the_api_takes() {
        let eta = Some(Span(Duration::from_millis(1500)));
        let (path, body) = prepared(What::ToolStart {
            tool: "bash".into(),
            call_id: None,
            detail: Some("ls".into()),
            eta,
        });
        assert_eq!(path, "/v1/sessions/a%2Fb/tool_start");
        assert_eq!(parse::tool_start(&body).unwrap().eta, eta.map(|s| s.0));
        let (path, body) = prepared(What::ToolEnd {
            call_id: Some("c".into()),
            failed: true,
        });
        assert_eq!(path, "/v1/sessions/a%2Fb/tool_end");
        assert_eq!(parse::tool_end(&body).unwrap().ok, Some(false));
        let (_, body) = prepared(What::ToolProgress {
            call_id: None,
            fraction: Some(0.5),
            eta: None,
        });
        assert_eq!(parse::tool_progress(&body).unwrap().fraction, Some(0.5));
        for (what, verb) in [
            (
                What::Prefetch {
                    eta,
                    priority: Some(-1.0),
                },
                HintVerb::Prefetch,
            ),
            (What::Pin { ttl: eta }, HintVerb::Pin),
            (What::Unpin, HintVerb::Unpin),
            (What::Retain, HintVerb::Retain),
            (What::Demote, HintVerb::Demote),
        ] {
            let (path, body) = prepared(what);
            assert_eq!(path, "/v1/hints");
            let envelope = parse::envelope(&body).unwrap();
            let action = &envelope.command.actions[0];
            assert_eq!(action.verb, verb);
            assert!(matches!(&action.target, Target::Session(name) if name.as_str() == "a/b"));
        }
    }

    #[test]
    fn two_messages_have_two_ids() {
        assert_ne!(message_id(), message_id());
    }
}
