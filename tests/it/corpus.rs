//! The fuzzer's corpus (`tests/fuzz/corpus`), and thousands of changes to it, through the functions that the fuzzer calls.
//!
//! The binary part is written by [`seeds`] from the types themselves. After a change of a format, write it anew with
//! `GREENROOM_WRITE_CORPUS=1 cargo test -p greenroom-tests --test it corpus`.

mod seeds;

use std::collections::BTreeMap;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use greenroom_tests::fuzz::TARGETS;
use greenroom_tests::random::{Random, from_environment, seed};

/// Changed inputs that each function is given.
const CHANGED: u64 = 4000;
/// Values at which formats tend to break.
const EDGES: [u8; 8] = [0, 1, 0x20, 0x22, 0x7f, 0x80, 0xfe, 0xff];

type Inputs = BTreeMap<String, Vec<u8>>;

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

fn kept(target: &str) -> Inputs {
    let entries = fs::read_dir(folder(target)).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

#[test]
fn the_binary_corpus_is_what_the_types_write() {
    for (target, seeds) in [("frames", seeds::frames()), ("plan", seeds::plans())] {
        if from_environment("GREENROOM_WRITE_CORPUS").is_some() {
            fs::remove_dir_all(folder(target)).ok();
            fs::create_dir_all(folder(target)).unwrap();
            for (name, bytes) in &seeds {
                fs::write(folder(target).join(name), bytes).unwrap();
            }
        }
        assert!(
            kept(target) == seeds,
            "tests/fuzz/corpus/{target} is of another format: write it anew, with GREENROOM_WRITE_CORPUS=1"
        );
    }
}

#[test]
fn every_kept_input_and_what_is_close_to_it_is_survived() {
    let seed = seed();
    println!("GREENROOM_SEED={seed}");
    let mut random = Random::new(seed);
    for (target, run) in TARGETS {
        let inputs: Vec<Vec<u8>> = kept(target).into_values().collect();
        assert!(inputs.len() >= 12, "{target} has a corpus");
        let changed = (0..CHANGED).map(|_| changed(&mut random, &inputs));
        for input in inputs.iter().cloned().chain(changed) {
            let survived = catch_unwind(|| run(&input));
            assert!(survived.is_ok(), "{target}: b\"{}\"", input.escape_ascii());
        }
    }
}

/// An input after one to four changes.
fn changed(random: &mut Random, inputs: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.pick(inputs).clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let end = (at + 1 + random.below(8)).min(bytes.len());
        match random.below(6) {
            0 if at < end => bytes[at] ^= 1 << random.below(8),
            1 if at < end => bytes[at] = *random.pick(&EDGES),
            2 => drop(bytes.drain(at..end)),
            3 => bytes.insert(at, *random.pick(&EDGES)),
            4 => {
                let other = random.pick(inputs);
                let from = random.below(other.len() + 1);
                let to = (from + random.below(32)).min(other.len());
                drop(bytes.splice(at..end, other[from..to].iter().copied()));
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}
