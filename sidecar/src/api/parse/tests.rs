//! Tests of the parser: what is taken, what is refused and in which words, and that nothing at all makes it panic.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn refused<T: std::fmt::Debug>(parsed: Result<T, ApiError>) -> String {
    parsed.unwrap_err().to_string()
}

fn bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

fn action_json(action_id: &str) -> Value {
    json!({
        "action_id": action_id, "action_type": "kv.prefetch", "action_version": "1.0",
        "payload": {"target": {"session_id": "agent-7"}, "eta_ms": 250.5, "priority": -2, "tier": "gpu"}
    })
}

fn envelope_json(actions: Vec<Value>) -> Value {
    json!({"protocol_version": "1.0", "message_id": "m1", "actions": actions})
}

/// The detail of the only, refused, action that has `key` (a JSON pointer) set to `value`.
fn detail_with(pointer: &str, value: Value) -> String {
    let mut action = action_json("a");
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    action.pointer_mut(parent).unwrap()[key] = value;
    let parsed = envelope(&bytes(&envelope_json(vec![action]))).unwrap();
    assert!(parsed.command.actions.is_empty(), "{pointer} was taken");
    match parsed.entries.into_iter().next().unwrap() {
        Entry::Refused { result, .. } => {
            assert_eq!(result.outcome, Outcome::Rejected);
            result.detail
        }
        Entry::Sent(_) => unreachable!("it was not sent"),
    }
}

#[test]
fn a_well_formed_envelope_becomes_commands() {
    let parsed = envelope(&bytes(&envelope_json(vec![
        action_json("a"),
        action_json("b"),
    ])))
    .unwrap();
    assert_eq!(parsed.command.message_id, "m1");
    let first = &parsed.command.actions[0];
    assert_eq!(
        (first.action_id.as_str(), first.verb),
        ("a", HintVerb::Prefetch)
    );
    assert!(matches!(&first.target, Target::Session(name) if name.as_str() == "agent-7"));
    assert_eq!(first.eta, Some(Duration::from_micros(250_500)));
    assert_eq!((first.priority, first.ttl), (-2000, None));
}

#[test]
fn every_verb_and_target_is_understood() {
    for (text, verb) in [
        ("kv.prefetch", HintVerb::Prefetch),
        ("kv.pin", HintVerb::Pin),
        ("kv.unpin", HintVerb::Unpin),
        ("kv.retain", HintVerb::Retain),
        ("kv.demote", HintVerb::Demote),
    ] {
        let mut action = action_json("a");
        action["action_type"] = json!(text);
        action["payload"] =
            json!({"target": {"block_hashes": ["0f".repeat(32), "A0".repeat(32)]}, "ttl_ms": 1});
        let parsed = envelope(&bytes(&envelope_json(vec![action]))).unwrap();
        let action = &parsed.command.actions[0];
        assert_eq!(action.verb, verb);
        assert_eq!(action.ttl, Some(Duration::from_millis(1)));
        let Target::Blocks(hashes) = &action.target else {
            unreachable!("{:?}", action.target)
        };
        assert_eq!((hashes[0].0, hashes[1].0), ([0x0f; 32], [0xa0; 32]));
    }
}

#[test]
fn a_bad_action_does_not_spoil_the_others_and_results_keep_their_order() {
    let actions = vec![
        action_json("a"),
        json!({"action_id": "b"}),
        json!(7),
        action_json("c"),
    ];
    let parsed = envelope(&bytes(&envelope_json(actions))).unwrap();
    assert_eq!(parsed.command.actions.len(), 2);
    let answers = ["c", "a"].map(|id| ActionResult {
        action_id: id.to_owned(),
        outcome: Outcome::Accepted,
        detail: String::new(),
        blocks: Some(3),
    });
    let answer = envelope_answer("m1".into(), parsed.entries, answers.into());
    let outcomes: Vec<_> = answer
        .results
        .iter()
        .map(|r| (r.action_id.as_str(), r.outcome))
        .collect();
    assert_eq!(
        outcomes,
        [
            ("a", "accepted"),
            ("b", "rejected"),
            ("", "rejected"),
            ("c", "accepted")
        ]
    );
    assert!(
        answer.results[1]
            .detail
            .contains("actions[1]: missing field"),
        "{}",
        answer.results[1].detail
    );
    assert!(
        answer.results[2].detail.contains("actions[2]"),
        "{}",
        answer.results[2].detail
    );
}

#[test]
fn a_reused_message_id_with_other_actions_loses_nothing() {
    let parsed = envelope(&bytes(&envelope_json(vec![action_json("new")]))).unwrap();
    let old = ActionResult {
        action_id: "old".into(),
        outcome: Outcome::Accepted,
        detail: String::new(),
        blocks: None,
    };
    let answer = envelope_answer("m1".into(), parsed.entries, vec![old]);
    assert_eq!(answer.results.len(), 1);
    assert_eq!(
        (
            answer.results[0].action_id.as_str(),
            answer.results[0].outcome
        ),
        ("new", "rejected")
    );
    assert!(answer.results[0].detail.contains("used before"));
}

#[test]
fn refusals_name_the_field() {
    let long = "x".repeat(ID_MAX + 1);
    for (pointer, value, telling) in [
        (
            "/action_id",
            json!(""),
            "actions[0].action_id: must have 1 to 256",
        ),
        ("/action_id", json!(long), "actions[0].action_id"),
        ("/action_id", json!(3), "actions[0].action_id: invalid type"),
        (
            "/action_type",
            json!("kv.fly"),
            "actions[0].action_type: must be kv.prefetch",
        ),
        (
            "/action_version",
            json!("2.0"),
            "actions[0].action_version: only 1.0",
        ),
        ("/surprise", json!(1), "unknown field `surprise`"),
        (
            "/payload",
            json!([]),
            "actions[0].payload: invalid type: sequence, expected an object",
        ),
        (
            "/payload/target",
            json!(["s", null, null]),
            "actions[0].payload.target: invalid type",
        ),
        ("/payload/surprise", json!(1), "unknown field `surprise`"),
        (
            "/payload/target",
            json!({}),
            "actions[0].payload.target: must have exactly one",
        ),
        ("/payload/target/request_id", json!("r"), "exactly one"),
        (
            "/payload/target/session_id",
            json!(""),
            "actions[0].payload.target.session_id",
        ),
        (
            "/payload/target",
            json!({"request_id": "r\n"}),
            "actions[0].payload.target.request_id",
        ),
        (
            "/payload/target",
            json!({"block_hashes": []}),
            "block_hashes: must have 1 to",
        ),
        (
            "/payload/target",
            json!({"block_hashes": ["00".repeat(32), "zz".repeat(32)]}),
            "block_hashes[1]: a block hash has 64",
        ),
        (
            "/payload/target",
            json!({"block_hashes": ["é".repeat(32)]}),
            "64 hexadecimal digits",
        ),
        ("/payload/target/other", json!(1), "unknown field `other`"),
        (
            "/payload/ttl_ms",
            json!(0),
            "payload.ttl_ms: must be more than 0",
        ),
        ("/payload/ttl_ms", json!(-1), "payload.ttl_ms"),
        ("/payload/ttl_ms", json!(86_400_001), "payload.ttl_ms"),
        ("/payload/ttl_ms", json!(1e300), "payload.ttl_ms"),
        (
            "/payload/ttl_ms",
            json!("soon"),
            "payload.ttl_ms: invalid type: string",
        ),
        (
            "/payload/eta_ms",
            json!(-0.5),
            "payload.eta_ms: must lie between 0",
        ),
        ("/payload/eta_ms", json!(6e8 + 5e6), "payload.eta_ms"),
        (
            "/payload/priority",
            json!(1e7),
            "payload.priority: must lie between",
        ),
        (
            "/payload/tier",
            json!("disk"),
            "payload.tier: this action is about the tier `gpu`",
        ),
    ] {
        let said = detail_with(pointer, value.clone());
        assert!(said.contains(telling), "{pointer} = {value}: {said}");
    }
}

#[test]
fn what_json_cannot_say_is_refused_too() {
    let text = br#"{"protocol_version":"1.0","message_id":"m","actions":[{"action_id":"a","action_type":"kv.pin",
        "action_version":"1.0","payload":{"target":{"session_id":"s"},"ttl_ms":1e999}}]}"#;
    let parsed = envelope(text).unwrap();
    assert!(
        matches!(&parsed.entries[0], Entry::Refused { verb: Some(HintVerb::Pin), result }
        if result.action_id == "a" && result.detail.contains("ttl_ms")),
        "{parsed:?}"
    );
    assert!(refused(tool_progress(b"{\"fraction\":NaN}")).contains("fraction"));
}

#[test]
fn the_same_action_id_counts_once() {
    let parsed = envelope(&bytes(&envelope_json(vec![
        action_json("a"),
        action_json("a"),
    ])))
    .unwrap();
    assert_eq!(parsed.command.actions.len(), 1);
    assert!(
        matches!(&parsed.entries[1], Entry::Refused { result, .. } if result.detail.contains("twice"))
    );
}

#[test]
fn a_malformed_action_does_not_use_up_its_id() {
    let mut bad = action_json("a");
    bad["payload"]["ttl_ms"] = json!(-1);
    let parsed = envelope(&bytes(&envelope_json(vec![bad, action_json("a")]))).unwrap();
    assert!(matches!(
        parsed.entries[..],
        [Entry::Refused { .. }, Entry::Sent(_)]
    ));
}

#[test]
fn ten_thousand_hints_at_once_are_refused_as_a_whole() {
    let actions = (0..10_000).map(|i| action_json(&i.to_string())).collect();
    let error = envelope(&bytes(&envelope_json(actions))).unwrap_err();
    let expected = ApiError::TooMany {
        field: "actions",
        sent: 10_000,
        limit: ACTIONS_MAX,
    };
    assert_eq!(error, expected);
    let most = (0..ACTIONS_MAX)
        .map(|i| action_json(&i.to_string()))
        .collect();
    let parsed = envelope(&bytes(&envelope_json(most))).unwrap();
    assert_eq!(parsed.command.actions.len(), ACTIONS_MAX);
}

#[test]
fn a_bad_envelope_is_refused_with_the_field() {
    for (text, telling) in [
        ("", "body: EOF"),
        ("{", "body: EOF"),
        ("[]", "body: invalid type: sequence, expected an object"),
        (r#"["1.0","m",[]]"#, "expected an object"),
        ("{} x", "body: missing field"),
        (
            r#"{"protocol_version":"1.0","message_id":"m","actions":[]} x"#,
            "trailing characters",
        ),
        (
            r#"{"protocol_version":"1.0","message_id":"m","actions":{}}"#,
            "actions: invalid type",
        ),
        (
            r#"{"protocol_version":"1.0","message_id":"","actions":[]}"#,
            "message_id: must have 1 to 256",
        ),
        (
            r#"{"protocol_version":"1.0","message_id":5,"actions":[]}"#,
            "message_id: invalid type",
        ),
        (
            r#"{"protocol_version":"3.0","message_id":"m","actions":[]}"#,
            "protocol_version: `3.0`",
        ),
        (
            r#"{"protocol_version":"1.0","message_id":"m","actions":[],"extra":1}"#,
            "unknown field `extra`",
        ),
        (
            r#"{"protocol_version":"1.0","message_id":"m"}"#,
            "missing field `actions`",
        ),
        (
            r#"{"message_id":"m","message_id":"m"}"#,
            "duplicate field `message_id`",
        ),
    ] {
        let said = refused(envelope(text.as_bytes()));
        assert!(said.contains(telling), "{text}: {said}");
    }
    assert!(refused(envelope(b"\xff\xfe")).contains("UTF-8"));
    let deep = "[".repeat(100_000);
    assert!(refused(envelope(deep.as_bytes())).contains("body"));
}

#[test]
fn deep_nesting_inside_an_action_is_refused_not_followed() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let text = format!(
        r#"{{"protocol_version":"1","message_id":"m","actions":[{{"action_id":"a","payload":{deep}}}]}}"#
    );
    match envelope(text.as_bytes()) {
        Ok(parsed) => assert!(matches!(parsed.entries[..], [Entry::Refused { .. }])),
        Err(error) => assert!(error.to_string().contains("recursion"), "{error}"),
    }
}

#[test]
fn an_error_repeats_only_so_much_of_what_was_sent() {
    let text = format!(r#"{{"{}":1}}"#, "ä".repeat(100_000));
    let said = refused(envelope(text.as_bytes()));
    assert!(
        said.len() < MESSAGE_MAX + 8 && said.contains("unknown field"),
        "{}",
        said.len()
    );
}

#[test]
fn tool_events_are_parsed_and_checked() {
    let start =
        tool_start(br#"{"tool":"bash","call_id":"c1","detail":"ls","eta_ms":1500}"#).unwrap();
    assert_eq!(
        (start.tool.as_str(), start.eta),
        ("bash", Some(Duration::from_millis(1500)))
    );
    assert_eq!(start.detail.as_deref(), Some("ls"));
    let progress = tool_progress(br#"{"fraction":0.5,"eta_ms":null}"#).unwrap();
    assert_eq!((progress.fraction, progress.eta), (Some(0.5), None));
    assert_eq!(tool_end(br#"{"ok":false}"#).unwrap().ok, Some(false));
    assert_eq!(tool_end(b" \n").unwrap().call_id, None);
    assert!(tool_progress(b"").is_ok());
    for (said, telling) in [
        (refused(tool_start(b"")), "body: EOF"),
        (refused(tool_start(b"{}")), "missing field `tool`"),
        (
            refused(tool_start(br#"{"tool":""}"#)),
            "tool: must have 1 to 128",
        ),
        (refused(tool_start(br#"{"tool":7}"#)), "tool: invalid type"),
        (
            refused(tool_start(br#"{"tool":"b","call_id":""}"#)),
            "call_id: must have",
        ),
        (
            refused(tool_start(br#"{"tool":"b","eta":1}"#)),
            "unknown field `eta`",
        ),
        (
            refused(tool_start(br#"{"tool":"b","eta_ms":1e12}"#)),
            "eta_ms: must lie",
        ),
        (
            refused(tool_progress(br#"{"fraction":1.5}"#)),
            "fraction: must lie between 0 and 1",
        ),
        (refused(tool_progress(br#"{"fraction":-0.1}"#)), "fraction"),
        (refused(tool_end(br#"{"ok":"yes"}"#)), "ok: invalid type"),
    ] {
        assert!(said.contains(telling), "{said}");
    }
}

#[test]
fn a_long_detail_is_cut_where_a_character_ends() {
    let text = json!({"tool": "bash", "detail": "é".repeat(DETAIL_KEPT)});
    let detail = tool_start(&bytes(&text)).unwrap().detail.unwrap();
    assert_eq!(detail, "é".repeat(DETAIL_KEPT / 2));
}

#[test]
fn session_names_are_checked() {
    assert!(session_id("a/b ü").is_ok());
    for bad in ["", "a\nb", &"x".repeat(257)] {
        assert!(refused(session_id(bad)).contains("session id in the path"));
    }
}

#[test]
fn batchagent_calls_are_taken_in_its_own_shape() {
    let hint = json!({"job_id": "j1", "kv_key": "k", "priority": 1000.0, "eta_seconds": 0.25, "block_ids": [[1, 2]]});
    let items = compat_prefetch(&bytes(
        &json!({"hints": [hint], "blocks": [[3, 4]], "kv_keys": ["k2"]}),
    ))
    .unwrap();
    assert_eq!(items.len(), 2);
    assert_eq!(items[0].session.as_ref().unwrap().as_str(), "j1");
    assert_eq!(items[0].eta, Some(Duration::from_millis(250)));
    assert_eq!(
        (items[1].kv_key.as_str(), items[1].session.is_none()),
        ("k2", true)
    );
    let pins = compat_pin(&bytes(
        &json!({"kv_keys": ["a", "b"], "block_ids": [7, [1, 2]]}),
    ))
    .unwrap();
    assert_eq!(pins.len(), 2);
    for (body, telling) in [
        (
            json!({"hints": [{"job_id": "j"}]}),
            "hints[0]: missing field `kv_key`",
        ),
        (
            json!({"hints": [{"job_id": "j", "kv_key": "k", "blocks": [[1, -2]]}]}),
            "hints[0].blocks[0]",
        ),
        (
            json!({"hints": [{"job_id": "", "kv_key": "k"}]}),
            "hints[0].job_id",
        ),
        (
            json!({"hints": [{"job_id": "j", "kv_key": "k", "eta_seconds": -1}]}),
            "hints[0].eta_seconds",
        ),
        (json!({"hints": [], "kv_keys": [""]}), "kv_keys[0]"),
        (json!({"hints": [["j", "k"]]}), "hints[0]: invalid type"),
        (json!({"hint": []}), "unknown field `hint`"),
    ] {
        let said = refused(compat_prefetch(&bytes(&body)));
        assert!(said.contains(telling), "{body}: {said}");
    }
    let many = vec!["k"; COMPAT_ENTRIES_MAX + 1];
    let error = compat_pin(&bytes(&json!({"kv_keys": many}))).unwrap_err();
    assert!(matches!(
        error,
        ApiError::TooMany {
            field: "kv_keys",
            ..
        }
    ));
}

/// Any JSON value, some of it with the names that the parser knows.
fn any_json() -> impl Strategy<Value = Value> {
    let names = prop::sample::select(vec![
        "protocol_version",
        "message_id",
        "actions",
        "action_id",
        "action_type",
        "action_version",
        "payload",
        "target",
        "session_id",
        "block_hashes",
        "ttl_ms",
        "eta_ms",
        "priority",
        "tier",
        "tool",
        "call_id",
        "hints",
        "kv_keys",
        "blocks",
    ]);
    let key = prop_oneof![3 => names.prop_map(str::to_owned), 1 => ".{0,6}"];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(json!("1.0")),
        Just(json!("kv.pin")),
    ];
    leaf.prop_recursive(5, 40, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Every parser, on the same bytes: no panic, and an error has something to say.
fn feed(bytes: &[u8]) {
    let errors = [
        envelope(bytes).err(),
        tool_start(bytes).err(),
        tool_progress(bytes).err(),
        tool_end(bytes).err(),
        compat_prefetch(bytes).err(),
        compat_pin(bytes).err(),
    ];
    for error in errors.into_iter().flatten() {
        assert!(
            error.to_string().contains(':') || matches!(error, ApiError::TooMany { .. }),
            "{error}"
        );
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        feed(&bytes);
    }

    #[test]
    fn arbitrary_json_never_panics(value in any_json()) {
        feed(&bytes(&value));
    }

    /// Whatever stands in `actions`, each entry gets exactly one answer.
    #[test]
    fn every_action_is_answered(actions in prop::collection::vec(prop_oneof![any_json(), Just(action_json("a"))], 0..12)) {
        let sent = actions.len();
        let parsed = envelope(&bytes(&envelope_json(actions))).unwrap();
        let answers = parsed.command.actions.iter().map(|a| ActionResult {
            action_id: a.action_id.clone(), outcome: Outcome::Accepted, detail: String::new(), blocks: None,
        }).collect();
        let well_formed = parsed.command.actions.len();
        let answer = envelope_answer(parsed.command.message_id, parsed.entries, answers);
        prop_assert_eq!(answer.results.len(), sent);
        prop_assert_eq!(answer.results.iter().filter(|r| r.outcome == "accepted").count(), well_formed);
        prop_assert!(answer.results.iter().all(|r| r.outcome == "accepted" || !r.detail.is_empty()));
    }

    /// A valid envelope with a few bytes changed, dropped or doubled.
    #[test]
    fn mutated_envelopes_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
    ) {
        let mut text = bytes(&envelope_json(vec![action_json("a"), action_json("b")]));
        for (at, byte, kind) in changes {
            let at = at.index(text.len());
            match kind {
                0 => text[at] = byte,
                1 => { text.remove(at); }
                _ => text.insert(at, byte),
            }
        }
        feed(&text);
    }
}
