//! Hint envelopes and BatchAgent's calls over HTTP.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use sidecar::api::wire::ACTIONS_MAX;

use super::Sidecar;

fn action(id: &str, session: &str) -> Value {
    json!({"action_id": id, "action_type": "kv.retain", "action_version": "1.0", "payload": {"target": {"session_id": session}}})
}

fn envelope(message: &str, actions: &[Value]) -> Value {
    json!({"protocol_version": "1.0", "message_id": message, "actions": actions})
}

fn outcomes(answer: &Value) -> Vec<(String, String)> {
    let results = answer["results"].as_array().unwrap();
    let word = |value: &Value| value.as_str().unwrap().to_owned();
    results
        .iter()
        .map(|r| (word(&r["action_id"]), word(&r["outcome"])))
        .collect()
}

#[test]
fn every_action_of_an_envelope_gets_its_own_outcome() {
    let sidecar = Sidecar::start();
    let mut bad = action("bad", "a");
    bad["payload"]["ttl_ms"] = json!(-5);
    let actions = [
        action("stranger", "nobody"),
        bad,
        json!("junk"),
        action("again", "nobody"),
        action("again", "nobody"),
    ];
    let answer = sidecar.post("/v1/hints", &envelope("m1", &actions));
    assert_eq!(answer.status, 200, "{answer:?}");
    let body = answer.json();
    assert_eq!(body["message_id"], "m1");
    let expected = [
        ("stranger", "missing"),
        ("bad", "rejected"),
        ("", "rejected"),
        ("again", "missing"),
        ("again", "rejected"),
    ];
    let expected = expected.map(|(id, outcome)| (id.to_owned(), outcome.to_owned()));
    assert_eq!(outcomes(&body), expected);
    let detail = body["results"][1]["detail"].as_str().unwrap();
    assert!(detail.starts_with("actions[1].payload.ttl_ms:"), "{detail}");
    let counted = |labels: &str| sidecar.metric(&format!("greenroom_hints_total{{{labels}}}"));
    assert!((counted("action=\"retain\",outcome=\"missing\"") - 2.0).abs() < 1e-9);
    assert!((counted("action=\"retain\",outcome=\"rejected\"") - 2.0).abs() < 1e-9);
    assert!((counted("action=\"unknown\",outcome=\"rejected\"") - 1.0).abs() < 1e-9);
}

#[test]
fn a_repeated_message_is_answered_as_before_and_done_once() {
    let sidecar = Sidecar::start();
    let sent = envelope("m1", &[action("a", "later")]);
    let first = sidecar.post("/v1/hints", &sent).json();
    assert_eq!(outcomes(&first)[0].1, "missing");
    sidecar.make_session("later");
    assert_eq!(
        sidecar.post("/v1/hints", &sent).json(),
        first,
        "the first answer, although the session exists now"
    );
    let other = sidecar
        .post("/v1/hints", &envelope("m2", &[action("a", "later")]))
        .json();
    assert_ne!(outcomes(&other)[0].1, "missing");
    let reused = sidecar
        .post("/v1/hints", &envelope("m1", &[action("b", "later")]))
        .json();
    assert_eq!(outcomes(&reused), [("b".to_owned(), "rejected".to_owned())]);
}

#[test]
fn an_empty_envelope_has_an_empty_answer() {
    let sidecar = Sidecar::start();
    let answer = sidecar.post("/v1/hints", &envelope("m", &[])).json();
    assert_eq!(answer, json!({"message_id": "m", "results": []}));
}

#[test]
fn ten_thousand_hints_at_once_get_one_clear_error_and_the_most_get_all_answers() {
    let sidecar = Sidecar::start();
    sidecar.make_session("a");
    let many = |n: usize| {
        (0..n)
            .map(|i| action(&i.to_string(), "a"))
            .collect::<Vec<_>>()
    };
    let refused = sidecar.post("/v1/hints", &envelope("m1", &many(10_000)));
    let message = refused.error(413, "too_many_entries");
    assert!(
        message.contains("10000")
            && message.contains("1024")
            && message.contains("nothing was done"),
        "{message}"
    );
    let answered = sidecar.post("/v1/hints", &envelope("m2", &many(ACTIONS_MAX)));
    assert_eq!(
        answered.json()["results"].as_array().unwrap().len(),
        ACTIONS_MAX
    );
    let counted = sidecar.get("/v1/status").json()["counters"].clone();
    let hints = counted
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| name.starts_with("greenroom_hints_total"));
    let hints: u64 = hints.map(|(_, count)| count.as_u64().unwrap()).sum();
    assert_eq!(
        hints,
        u64::try_from(ACTIONS_MAX).unwrap(),
        "none of the refused ones was done"
    );
}

#[test]
fn another_protocol_version_is_refused_as_a_whole() {
    let sidecar = Sidecar::start();
    let mut sent = envelope("m", &[action("a", "s")]);
    sent["protocol_version"] = json!("2.0");
    let message = sidecar
        .post("/v1/hints", &sent)
        .error(400, "unsupported_version");
    assert!(message.contains("2.0"), "{message}");
}

#[test]
fn batchagent_gets_its_own_shape_with_real_outcomes() {
    let sidecar = Sidecar::start();
    let hint = json!({"job_id": "j1", "kv_key": "k1", "priority": 2.0, "eta_seconds": 0.5, "block_ids": [[1, 2]]});
    let headers = [
        "authorization: Bearer EMPTY",
        "content-type: application/json",
    ];
    let body = json!({"hints": [hint, hint], "kv_keys": ["k2"]}).to_string();
    let answer = sidecar.send_with("POST", "/internal/prefetch", &headers, body.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = answer.json();
    assert_eq!(
        (&answer["ok"], &answer["prefetched"]),
        (&json!(true), &json!({}))
    );
    assert_eq!(answer["missing"], json!(["k1", "k1", "k2"]));
    let pinned = sidecar
        .post("/internal/pin_blocks", &json!({"kv_keys": ["k1"]}))
        .json();
    assert_eq!(
        (&pinned["ok"], &pinned["pinned"], &pinned["missing"]),
        (&json!(true), &json!({}), &json!(["k1"]))
    );
    assert!((sidecar.metric("prefetch_missing_total") - 3.0).abs() < 1e-9);
    assert!(sidecar.metric("prefetch_block_pairs_total").abs() < 1e-9);
    let bad = sidecar.post(
        "/internal/prefetch",
        &json!({"hints": [], "blocks": [[1, "x"]]}),
    );
    assert!(bad.error(400, "malformed").starts_with("blocks[0]"));
}

/// Valid bodies with a few bytes changed, against the running sidecar: always an answer of the contract, and it goes on serving.
#[test]
fn mutated_bodies_are_answered() {
    let sidecar = Sidecar::start();
    sidecar.make_session("a");
    let valid = [
        (
            "/v1/hints",
            envelope("m", &[action("a", "a"), action("b", "x")]),
        ),
        (
            "/v1/sessions/a/tool_start",
            json!({"tool": "bash", "eta_ms": 5}),
        ),
        (
            "/internal/prefetch",
            json!({"hints": [{"job_id": "a", "kv_key": "k", "eta_seconds": 1}]}),
        ),
    ];
    let mutations = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let cases = (0..valid.len(), mutations);
    let mut runner = TestRunner::new(Config::with_cases(300));
    let done = runner.run(&cases, |(which, changes)| {
        let (path, body) = &valid[which];
        let mut bytes = body.to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let answer = sidecar.send("POST", path, &bytes);
        match answer.status {
            200 => drop(answer.json()),
            400 => drop(answer.error(400, answer.json()["error"]["code"].as_str().unwrap())),
            409 => drop(answer.error(409, "too_many_calls")),
            other => panic!("status {other}: {answer:?}"),
        }
        Ok(())
    });
    done.unwrap();
    sidecar.assert_serves();
}
