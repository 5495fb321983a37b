//! The middle of it all: a simulated engine on the real hooks, protocol, store and copies.

mod endings;
mod limits;
mod lookups;
mod returns;

use std::time::Instant;

use greenroom_tests::engine::{Engine, Options, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use serde_json::json;
use sidecar::engine::frames::CopyClass;
use sidecar::hooks::{GpuPool, Holders, LOAD_STEPS_MAX, Match, Prefetch, StepMode};

const MEMORY: &str = "4MiB";
/// Blocks of a session: more than holds may protect in a pool of 100.
const BLOCKS: u64 = 40;

/// Steps until a session is in the arena in full.
fn saved(engine: &mut Engine, sidecar: &Sidecar, name: &str, blocks: u64) {
    until("the session is saved", || {
        engine.step();
        let session = sidecar.find(&format!("/v1/sessions/{name}"));
        session.is_some_and(|session| session["blocks"]["host"] == blocks)
    });
}

/// A turn of a session that is in the arena in full when this returns.
fn turn_and_save(engine: &mut Engine, sidecar: &Sidecar, name: &str, chain: &[kvstore::BlockHash]) {
    engine.turn(Some(name), chain);
    saved(engine, sidecar, name, chain.len() as u64);
}

/// A sidecar, and an engine with a pool of 100 blocks; session "a", of 40 blocks, is on the GPU and in the arena.
pub(crate) fn with_a_saved() -> (Sidecar, Engine, Vec<kvstore::BlockHash>) {
    let sidecar = Sidecar::start(MEMORY);
    let mut engine = Engine::start(&sidecar, "e", 100);
    let mine = session(40, 1);
    turn_and_save(&mut engine, &sidecar, "a", &mine);
    (sidecar, engine, mine)
}

/// Other traffic until nothing of a session is left in the pool: after one flood, holds may have kept some of it.
pub(crate) fn evict(engine: &mut Engine, chain: &[kvstore::BlockHash]) {
    for round in 0..100 {
        engine.flood(7 ^ (round << 24), 200);
        if engine.pool.leading(chain) == 0 {
            return;
        }
    }
    panic!("100 floods did not evict the session");
}

/// Returns when the engine has taken in whatever the sidecar has sent it by now: answers do not overtake wants.
fn hear(engine: &mut Engine) {
    let hooks = &mut engine.hooks;
    hooks.turn_started("probe", None, &session(2, 99), Instant::now());
    until("the probe is answered", || hooks.knows_session("probe"));
    hooks.turn_ended("probe", &[], Instant::now());
}

/// What a client gets that waits for the engine's answer.
fn while_stepping<T: Send>(engine: &mut Engine, ask: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let asking = scope.spawn(ask);
        until("the client is answered", || {
            engine.step();
            asking.is_finished()
        });
        asking.join().unwrap()
    })
}

fn session(blocks: u32, id: u32) -> Vec<kvstore::BlockHash> {
    chain((0..blocks).map(|i| id << 20 | i))
}
