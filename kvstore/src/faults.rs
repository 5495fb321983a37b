//! Fault points: places at which a test, or `greenroom serve --fault`, makes something go wrong on purpose.
//!
//! Only in builds with the feature `faults`; in all others [`fault!`](crate::fault) is `false` and
//! [`fault_delay!`](crate::fault_delay) is nothing. A point is named `module::operation::fault`, and [`POINTS`] lists every
//! one of every crate. Points belong to the process. While none is armed, passing one costs a load.
//!
//! What happens at an armed point is said as the crate `fail` reads it: `return` (it strikes each time), `1*return` (once),
//! `3*off->1*return` (the fourth time only), `10%return`; at points that end in `delay`: `sleep(20)` (milliseconds) or
//! `pause` (held until it is armed anew); `off`.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// One fault point.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// `module::operation::fault`.
    pub name: &'static str,
    /// What goes wrong.
    pub does: &'static str,
    /// What holds all the same.
    pub then: &'static str,
    /// Who passes it.
    pub place: Place,
}

/// A process that passes fault points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// `greenroom serve`.
    Sidecar,
    /// vLLM's scheduler or worker.
    Engine,
}

/// Every point, along the way of a block.
pub const POINTS: &[Point] = &[
    in_sidecar(
        "store::reserve::full",
        "no slot can be given to a block that is to be saved",
        "the block is not stored; its next turn saves it",
    ),
    in_sidecar(
        "store::commit::refused",
        "a reservation counts as expired when it is committed",
        "nothing is published, its slots are free",
    ),
    in_sidecar(
        "actor::settle::lost",
        "a commit or an abort never reaches the store",
        "nothing is published; its slots come back with the connection's end",
    ),
    in_sidecar(
        "server::welcome::kill",
        "the connection ends in place of a welcome",
        "the engine asks again",
    ),
    in_sidecar(
        "server::write::delay",
        "a frame to an engine is late, or held",
        "its request misses in time; other engines are answered",
    ),
    in_sidecar(
        "server::write::reorder",
        "a frame to an engine goes after the next",
        "no lease is believed that was given back",
    ),
    in_sidecar(
        "server::write::duplicate",
        "a frame to an engine goes twice",
        "no lease is given back that is in use",
    ),
    in_sidecar(
        "server::write::truncate",
        "half a frame to an engine, then the end",
        "the engine connects anew",
    ),
    in_sidecar(
        "server::write::flip",
        "a bit of a header to an engine is flipped (`return(BIT)`, 0 to 191)",
        "the engine connects anew",
    ),
    in_sidecar(
        "server::write::kill",
        "the connection ends in place of a frame",
        "the engine connects anew",
    ),
    in_sidecar(
        "server::write::abort",
        "the sidecar dies in place of a frame",
        "a miss for its engines, until it is started again",
    ),
    in_engine(
        "client::hello::kill",
        "the connection ends in place of a hello",
        "the engine tries again",
    ),
    in_engine(
        "client::write::delay",
        "a frame to the sidecar is late, or held",
        "its request misses in time; other engines are answered",
    ),
    in_engine(
        "client::write::reorder",
        "a frame to the sidecar goes after the next",
        "the sidecar ends the connection, the engine connects anew",
    ),
    in_engine(
        "client::write::duplicate",
        "a frame to the sidecar goes twice",
        "the sidecar ends the connection, the engine connects anew",
    ),
    in_engine(
        "client::write::truncate",
        "half a frame to the sidecar, then the end",
        "the engine connects anew",
    ),
    in_engine(
        "client::write::flip",
        "a bit of a header to the sidecar is flipped (`return(BIT)`, 0 to 191)",
        "the sidecar ends the connection, the engine connects anew",
    ),
    in_engine(
        "client::write::kill",
        "the connection ends in place of a frame",
        "the engine connects anew",
    ),
    in_engine(
        "client::write::abort",
        "the engine's process dies in place of a frame",
        "its slots drain until the process is gone, then they are free",
    ),
    in_engine(
        "hooks::recheck_saves::skip",
        "saves are not checked before a step computes",
        "a defect made on purpose: the scheduler harness sees wrong bytes",
    ),
    in_engine(
        "hooks::reset::skip",
        "the engine's reset is not heard",
        "a defect made on purpose: the scheduler harness sees wrong bytes",
    ),
    in_engine(
        "budget::admit::one_less",
        "a block of the reserve is given away",
        "a defect made on purpose: the scheduler harness sees the reserve taken",
    ),
    in_engine(
        "mover::submit::report_early",
        "a prefetch is said to be done before it is",
        "a defect made on purpose: the scheduler harness sees wrong bytes",
    ),
    in_engine(
        "host::copy::delay",
        "a copy is late, or held, before its last range",
        "what waits for it waits; nothing else does",
    ),
    in_engine(
        "host::copy::fail",
        "a copy fails before its first byte",
        "a load is computed in its place, a save is not published",
    ),
    in_engine(
        "thread::submit::skip_wake",
        "the copy thread is not woken for a job",
        "a defect made on purpose: the models see a wait that nothing ends",
    ),
    in_engine(
        "thread::fence::skip_wait",
        "a fence does not wait for copies that run",
        "a defect made on purpose: the models see a copy after it",
    ),
    in_engine(
        "owner::settle::skip_wake",
        "who waits for a job's end is not woken by it",
        "a defect made on purpose: the models see a wait that nothing ends",
    ),
    in_engine(
        "thread::take_finished::late",
        "ended copies are not told yet",
        "they are told later, each once",
    ),
    in_sidecar(
        "gate::handler::delay",
        "a call of the API is late, or held",
        "other calls are answered",
    ),
    in_sidecar(
        "handle::ask::busy",
        "the actor's queue counts as full",
        "429 with `Retry-After`; the next call is answered",
    ),
    in_sidecar(
        "gate::answer::cut",
        "the connection ends in the middle of an answer",
        "the next call is answered",
    ),
];

const fn in_sidecar(name: &'static str, does: &'static str, then: &'static str) -> Point {
    Point {
        name,
        does,
        then,
        place: Place::Sidecar,
    }
}

const fn in_engine(name: &'static str, does: &'static str, then: &'static str) -> Point {
    Point {
        name,
        does,
        then,
        place: Place::Engine,
    }
}

/// What is known of a point, at its place in [`POINTS`].
struct State {
    armed: AtomicBool,
    reached: AtomicU64,
}

static STATES: [State; POINTS.len()] = [const {
    State {
        armed: AtomicBool::new(false),
        reached: AtomicU64::new(0),
    }
}; POINTS.len()];

/// Points that are armed: while there are none, nobody looks further.
static ARMED: AtomicUsize = AtomicUsize::new(0);

/// Why a point was not armed.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// There is no such point.
    #[error("there is no fault point `{name}`; these there are: {}", names())]
    Unknown {
        /// As given.
        name: String,
    },
    /// The actions are not as the crate `fail` reads them.
    #[error(
        "the actions of `{name}` are not understood ({reason}); examples: return, 3*off->1*return, sleep(20), pause, off"
    )]
    Actions {
        /// The point.
        name: String,
        /// What `fail` said.
        reason: String,
    },
}

fn names() -> String {
    let names: Vec<&str> = POINTS.iter().map(|point| point.name).collect();
    names.join(", ")
}

fn find(name: &str) -> Option<&'static State> {
    let at = POINTS.iter().position(|point| point.name == name)?;
    Some(&STATES[at])
}

/// Says what happens at a point from now on. What is held there goes on.
///
/// # Errors
/// [`FaultError`]; the point is as it was.
pub fn arm(name: &str, actions: &str) -> Result<(), FaultError> {
    let name = name.to_owned();
    let Some(state) = find(&name) else {
        return Err(FaultError::Unknown { name });
    };
    if let Err(reason) = fail::cfg(&name, actions) {
        return Err(FaultError::Actions { name, reason });
    }
    let armed = actions.trim() != "off";
    match (state.armed.swap(armed, Ordering::SeqCst), armed) {
        (false, true) => ARMED.fetch_add(1, Ordering::SeqCst),
        (true, false) => ARMED.fetch_sub(1, Ordering::SeqCst),
        _ => 0,
    };
    Ok(())
}

/// How often a fault has struck at this point, or delayed something there, since the process began.
///
/// # Panics
/// If there is no such point.
pub fn reached(name: &str) -> u64 {
    known(name).reached.load(Ordering::SeqCst)
}

fn known(name: &str) -> &'static State {
    find(name).unwrap_or_else(|| panic!("`{name}` is not in kvstore::faults::POINTS"))
}

/// Whether the point is armed.
pub fn is_armed(name: &'static str) -> bool {
    ARMED.load(Ordering::SeqCst) > 0 && known(name).armed.load(Ordering::SeqCst)
}

/// Whether a fault strikes here, now. What [`fault!`](crate::fault) asks.
pub fn strikes(name: &'static str) -> bool {
    argument(name).is_some()
}

/// As [`strikes`], with what stands between the brackets of `return(…)`, which may be nothing.
pub fn argument(name: &'static str) -> Option<String> {
    if !is_armed(name) {
        return None;
    }
    let given = act(name);
    if given.is_some() {
        known(name).reached.fetch_add(1, Ordering::SeqCst);
    }
    given
}

/// Sleeps or waits here if the point says so. What [`fault_delay!`](crate::fault_delay) does.
pub fn delay(name: &'static str) {
    if is_armed(name) {
        // Counted first: whoever holds it sees that it is held.
        known(name).reached.fetch_add(1, Ordering::SeqCst);
        drop(act(name));
    }
}

fn act(name: &str) -> Option<String> {
    fail::fail_point!(name, |given: Option<String>| Some(
        given.unwrap_or_default()
    ));
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_strikes_when_it_is_told_to_and_counts_it() {
        let name = "store::reserve::full";
        let strikes = || (0..4).map(|_| strikes(name)).collect::<Vec<_>>();
        assert_eq!(strikes(), [false; 4]);
        arm(name, "2*off->1*return(7)").unwrap();
        assert_eq!(strikes(), [false, false, true, false]);
        assert_eq!(reached(name), 1);
        arm(name, "return(7)").unwrap();
        assert_eq!(argument(name).as_deref(), Some("7"));
        arm(name, "off").unwrap();
        assert_eq!(strikes(), [false; 4]);
        assert!(!is_armed(name));
    }

    #[test]
    fn what_cannot_be_armed_is_said() {
        let unknown = arm("store::reserve::ful", "return")
            .unwrap_err()
            .to_string();
        assert!(unknown.contains("store::commit::refused"), "{unknown}");
        let strange = arm("store::commit::refused", "retrun").unwrap_err();
        assert!(strange.to_string().contains("return"), "{strange}");
        assert!(!is_armed("store::commit::refused"));
    }

    #[test]
    fn names_are_unlike_and_in_the_agreed_form() {
        for (at, point) in POINTS.iter().enumerate() {
            assert_eq!(point.name.split("::").count(), 3, "{}", point.name);
            assert!(
                POINTS[..at].iter().all(|other| other.name != point.name),
                "{}",
                point.name
            );
            assert!(
                !point.does.is_empty() && !point.then.is_empty(),
                "{}",
                point.name
            );
        }
    }
}
