#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkyard::fuzzing::scgi_script(data));
